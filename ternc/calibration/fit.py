"""W [N, K], moments of x -> codes and scales of least error of the outputs W x.

    rtn:  the closed form of the op ternc::fit; x is not looked at
    als:  alternating least squares in the metric diag(H)
    gptq: error compensation in the metric H, then joint refits of steps and codes in turn

All three through the same grid. Rows do not know of each other: weights that share their inputs
are fitted as one stack of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ternc.calibration import plane_refit
from ternc.calibration.gptq import compensate, damped, inverse_factor
from ternc.calibration.grid import Grid
from ternc.calibration.moments import Moments
from ternc.calibration.plane_grid import PlaneGrid, grid_of
from ternc.calibration.refit import refit_codes, refit_steps
from ternc.config import Config
from ternc.formats import fit as data_free
from ternc.formats.quantized import Quantized
from ternc.formats.rotation import Rotation

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

    @classmethod
    def of(cls, moments: Moments, centred: bool, rotation: Rotation | None = None) -> Metric:
        """The metric of inputs with these moments.

        Args:
            centred: a bias takes up the mean of the error, so that only its spread counts.
            rotation: of the inputs, after the moments were taken.
        """
        few = moments.count < ENOUGH_ROWS * len(moments.mean)
        rotated = moments if rotation is None else moments.rotated(rotation)
        hessian = damped(rotated.metric(centred), SHORT_DAMPING if few else DAMPING)
        del rotated
        return cls(hessian)

    @functools.cached_property
    def factor(self) -> torch.Tensor:
        """Upper Cholesky factor of the inverse, fp32 [K, K]; compensation alone wants it."""
        return inverse_factor(self.hessian)


def fit(
    weights: Sequence[torch.Tensor],
    metric: Metric,
    planes: int,
    config: Config,
    method: str,
    sweeps: int = SWEEPS,
) -> list[Quantized]:
    """Weights fp32 [N, K] of one input, finite -> codes and scales of each.

    Args:
        metric: of the inputs, rotated as the weights are.
        method: "rtn", "als" or "gptq".
        sweeps: rounds of refits after compensation; "als" is at its optimum without.
    """
    if method == "rtn":
        return [data_free.fit(w, planes, config, 0) for w in weights]
    if config.fit_group == -1 and len(weights) > 1:  # a step is then shared by all rows of a weight
        return [fit([w], metric, planes, config, method, sweeps)[0] for w in weights]
    w = torch.cat(list(weights))
    grid = grid_of(w, planes, config)
    codes = _first_codes(w, metric, grid, method)
    if isinstance(grid, Grid) and grid.group_size > 0 and config.tie_scales:
        grid.tie(_energy(codes, metric.hessian.diagonal(), grid))
        codes = _first_codes(w, metric, grid, method)
    if method == "gptq" and sweeps:
        codes = _refitted(w, codes, metric.hessian, grid, sweeps)
    ends = list(itertools.accumulate(map(len, weights), initial=0))
    return [
        grid.of_rows(slice(*part)).quantized(codes[slice(*part)])
        for part in itertools.pairwise(ends)
    ]


def _refitted(
    w: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid | PlaneGrid,
    sweeps: int,
) -> torch.Tensor:
    """Codes after rounds of refits; the scales of `grid` are those of the last."""
    uniform = isinstance(grid, Grid)
    scales: Any = refit_steps if uniform else plane_refit.refit_scales
    sweep: Any = refit_codes if uniform else plane_refit.refit_codes
    target = w @ hessian
    for _ in range(sweeps):
        scales(target, codes, hessian, grid)
        codes = sweep(w, codes, hessian, grid)
    scales(target, codes, hessian, grid)
    return codes


def _first_codes(
    w: torch.Tensor, metric: Metric, grid: Grid | PlaneGrid, method: str
) -> torch.Tensor:
    """Codes fp32 [N, K] before refits; the scales of `grid` are set on the way."""
    if method == "gptq":
        return compensate(w, metric.factor, grid)
    size, diagonal = grid.columns_per_group, metric.hessian.diagonal()
    for group, part in enumerate(w.split(size, 1)):
        grid.fit_group(group, part, diagonal[group * size : (group + 1) * size])
    return grid.nearest(w)


def _energy(codes: torch.Tensor, diagonal: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What a relative error of each step costs: sum over its columns of H_jj c_j^2, [N, G]."""
    costs = codes.square() * diagonal
    return torch.stack([part.sum(1) for part in costs.split(grid.columns_per_group, 1)], 1)
