"""W [N, K], moments of x -> codes and scales of least error of the outputs W x.

    rtn:  the closed form of the op ternc::fit; x is not looked at
    als:  alternating least squares in the metric diag(H)
    gptq: error compensation in the metric H, then joint refits of steps and codes in turn

All three through the same grid: `als` is compensation with a diagonal factor, where there is
nothing to spread.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.calibration.gptq import compensate, damped, inverse_factor
from ternc.calibration.grid import Grid
from ternc.calibration.moments import Moments
from ternc.calibration.refit import refit_codes, refit_steps
from ternc.config import Config
from ternc.formats import fit as data_free
from ternc.formats.quantized import Quantized

SWEEPS = 8
"""Rounds of steps and codes after compensation; each lowers the error, the last by under 1 %."""

DAMPING = 0.01
SHORT_DAMPING = 0.1
"""Part of mean(diag H) added to H; the second where rows are few."""

ENOUGH_ROWS = 8
"""Rows of calibration data for each column, from which on they are not few."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """What an error of a weight costs: H, damped, and its factor. Shared by layers of one input."""

    hessian: torch.Tensor
    """fp32 [K, K]."""
    factor: torch.Tensor
    """Upper Cholesky factor of the inverse, fp32 [K, K]."""

    @classmethod
    def of(cls, moments: Moments, centred: bool) -> Metric:
        """The metric of inputs with these moments.

        Args:
            centred: a bias takes up the mean of the error, so that only its spread counts.
        """
        second = moments.metric(centred)
        few = moments.count < ENOUGH_ROWS * len(second)
        hessian = damped(second, SHORT_DAMPING if few else DAMPING)
        return cls(hessian, inverse_factor(hessian))

    def diagonal(self) -> Metric:
        """The same without what ties the columns together: nothing is compensated."""
        diagonal = self.hessian.diagonal()
        return Metric(torch.diag(diagonal), torch.diag(diagonal.rsqrt()))


def fit(
    w: torch.Tensor,
    metric: Metric,
    planes: int,
    config: Config,
    method: str,
    sweeps: int = SWEEPS,
) -> Quantized:
    """w fp32 [N, K], finite -> codes and scales.

    Args:
        metric: of the inputs, rotated as w is.
        method: "rtn", "als" or "gptq".
        sweeps: rounds of refits after compensation; "als" is at its optimum without.
    """
    if method == "rtn":
        return data_free.fit(w, planes, config, 0)
    metric = metric if method == "gptq" else metric.diagonal()
    grid = Grid.of(w, planes, config)
    codes = compensate(w, metric.factor, grid)
    if grid.group_size > 0 and config.tie_scales:
        grid.tie(_energy(codes, metric.hessian.diagonal(), grid))
        codes = compensate(w, metric.factor, grid)
    if method == "gptq" and sweeps:
        target = w @ metric.hessian
        for _ in range(sweeps):
            refit_steps(target, codes, metric.hessian, grid)
            codes = refit_codes(w, codes, metric.hessian, grid)
        refit_steps(target, codes, metric.hessian, grid)
    return grid.quantized(codes)


def _energy(codes: torch.Tensor, diagonal: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What a relative error of each step costs: sum over its columns of H_jj c_j^2, [N, G]."""
    costs = codes.square() * diagonal
    return torch.stack([part.sum(1) for part in costs.split(grid.columns_per_group, 1)], 1)
