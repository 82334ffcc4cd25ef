"""W, moments -> the weight that on the inputs x of now gives best what W gives on the float f.

    W* = W + a W E[d x^T] inv(E[x x^T]), d = f - x:  the regression of W f on x

Layers in front have been quantised, so x is not f; a part of what they got wrong can be put right
here (Li et al., "GPTAQ", 2025: asymmetric calibration). How much of it holds beyond the data it was
fitted to is measured on held-out rows: 0 <= a <= 1 is the best there.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.calibration.gptq import damped
from ternc.calibration.moments import SplitMoments

DAMPING = 0.1
"""Part of mean(diag) added to the moment that is inverted: the regression sees noise too."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a layer should compute from its inputs of now."""

    weight: torch.Tensor
    """W*, fp32 [N, K]."""
    shift: torch.Tensor
    """What the mean output lacks of a W E[f] - W* E[x] beside the bias, fp32 [N]."""


def transfer(split: SplitMoments, centred: bool) -> torch.Tensor | None:
    """E[d x^T] inv(E[x x^T]), fp32 [K, K]; None where the float inputs are not known."""
    lag = split.fitted.lag_metric(centred)
    if lag is None or split.held_out.lag is None:
        return None
    lower = torch.linalg.cholesky(damped(split.fitted.metric(centred), DAMPING).double())
    return torch.cholesky_solve(lag.T.double(), lower).T.float()


def target_of(
    w: torch.Tensor, passed_on: torch.Tensor | None, split: SplitMoments, centred: bool
) -> Target:
    """The target for w fp32 [N, K].

    Args:
        passed_on: `transfer` of these moments.
    """
    held_out, fitted = split.held_out, split.fitted
    lag = held_out.lag_metric(centred)
    if passed_on is None or lag is None or fitted.lag_mean is None:
        return Target(w, w.new_zeros(len(w)))
    change = w @ passed_on
    gain = ((w @ lag) * change).sum(dtype=torch.float64)
    cost = ((change @ held_out.metric(centred)) * change).sum(dtype=torch.float64)
    part = float((gain / cost).clamp(0, 1)) if cost > 0 else 0.0
    weight = w + part * change
    # The change acts on x about its mean; the mean of f comes with the same share.
    return Target(weight, part * (w @ fitted.lag_mean) - part * (change @ fitted.mean))
