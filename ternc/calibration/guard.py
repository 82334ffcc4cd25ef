"""Candidate fits of one layer -> the one of least error on held-out inputs, and why.

Error compensation trusts its Hessian; on too few inputs it can end up worse than no compensation.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.calibration.moments import Moments, output_error
from ternc.formats.quantized import Quantized
from ternc.formats.rotation import Rotation


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One fit of one layer."""

    method: str
    rotation: Rotation | None
    quantized: Quantized
    """Of the rotated weight where there is a rotation."""
    error: float
    """Relative error of the outputs on held-out inputs."""
    difference: torch.Tensor
    """W - Q in the weight's own basis, rotated where the weight is; fp32 [N, K]."""


def judged(
    w: torch.Tensor,
    quantized: Quantized,
    method: str,
    rotation: Rotation | None,
    held_out: Moments,
    centred: bool,
) -> Candidate:
    """A candidate with its error. `w` and `held_out` are rotated where the candidate is."""
    metric = held_out.covariance() if centred else held_out.second
    difference = w - quantized.dequantize()
    error = output_error(difference, w, metric)
    return Candidate(method, rotation, quantized, error, difference)


def fell_back(chosen: Candidate, candidates: list[Candidate]) -> str:
    """What the report says where error compensation lost on held-out inputs; else nothing."""
    tried = [c for c in candidates if c.method == "gptq" and c.rotation == chosen.rotation]
    if chosen.method == "gptq" or not tried:
        return ""
    return (
        f"; gptq fell back to {chosen.method}: held-out error {tried[0].error:.3g} "
        f"against {chosen.error:.3g}"
    )
