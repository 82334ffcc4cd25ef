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
    """Target - Q in the basis of the layer's own inputs, fp32 [N, K]."""


def judged(
    target: torch.Tensor,
    quantized: Quantized,
    method: str,
    rotation: Rotation | None,
    held_out: Moments,
    centred: bool,
) -> Candidate:
    """A candidate with its error.

    Args:
        target: the weight that was fitted, not rotated, fp32 [N, K].
        quantized: rotated where there is a rotation.
        held_out: of the layer's inputs, not rotated.
    """
    q = quantized.dequantize()
    difference = target - (q if rotation is None else rotation.restore(q))
    error = output_error(difference, target, held_out.metric(centred))
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
