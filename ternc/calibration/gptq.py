"""W [N, K], H -> codes by columns, the error of each spread over the columns still to come.

    U = upper Cholesky factor of inv(H + damping)
    per group: step fitted to the compensated weights, metric 1 / U_jj^2
    per column j: q_j = snap(w_j);  w_rest -= (w_j - q_j) / U_jj * U_j,rest

Frantar et al., "GPTQ" (2023), equations 2 and 4, with the scales fitted group by group (Lazy): a
scale fitted once in front would not know the weights that compensation has changed.
"""

from __future__ import annotations

import torch

from ternc.calibration.grid import Grid
from ternc.calibration.plane_grid import PlaneGrid
from ternc.calibration.replay import replay

BLOCK = 128
"""Columns whose updates to the columns beyond are applied as one product."""


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I, fp32 [K, K]; a column without input gets 1 on its diagonal.

    Raises nothing for a rank-deficient H: that is what the damping is for.
    """
    diagonal = hessian.diagonal()
    ridge = float(diagonal.mean()) * damping
    result = hessian.clone()
    result.diagonal().add_(ridge if ridge > 0 else 1.0)
    result.diagonal()[diagonal <= 0] = 1.0
    return result


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor U of inv(H), U^T U = inv(H); computed in fp64, fp32 [K, K]."""
    # One expression: no more than two fp64 matrices are alive at a time.
    return torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())), upper=True
    ).float()


def compensate(w: torch.Tensor, factor: torch.Tensor, grid: Grid | PlaneGrid) -> torch.Tensor:
    """w fp32 [N, K] -> codes fp32 [N, K] on `grid`, whose scales are set group by group.

    Args:
        factor: `inverse_factor` of the damped Hessian.
        grid: its `steps` or `scales` are written.
    """
    w = w.clone()
    codes = torch.empty_like(w)
    columns = w.shape[1]
    weight = factor.diagonal().square().reciprocal()
    size = grid.columns_per_group
    for first in range(0, columns, size):
        last = min(first + size, columns)
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            if start == first:
                # A group wider than a block is fitted to what is known of it: its start is exact,
                # the rest lacks the updates of its own blocks.
                values = grid.fit_group(first // size, w[:, first:last], weight[first:last])
            errors = _compensate_block(w, codes, factor, values, grid.cmax, slice(start, stop))
            if stop < columns:
                w[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _compensate_block(
    w: torch.Tensor,
    codes: torch.Tensor,
    factor: torch.Tensor,
    values: torch.Tensor,
    cmax: int,
    block: slice,
) -> torch.Tensor:
    """Codes of the columns in `block`; returns their errors / U_jj, [N, block].

    Args:
        values: the steps [N] of a uniform grid, or the levels [N, C] of another.
    """
    # Transposed: a column is then one run of memory.
    local = w[:, block].T.contiguous()
    if values.dim() == 2:
        found, errors = replay(_columns_of_levels, (local, factor[block, block], values), cmax)
        codes[:, block] = torch.where(values.any(1), found, 0.0).T
        return errors.T
    step = values
    safe = torch.where(step == 0, 1.0, step)
    found, errors = replay(_columns, (local, factor[block, block], step, safe), cmax)
    codes[:, block] = torch.where(step == 0, 0.0, found).T
    return errors.T


def _columns(
    local: torch.Tensor, factor: torch.Tensor, step: torch.Tensor, safe: torch.Tensor, cmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column after column [L, N]: its codes, and its errors / U_jj spread over those behind it."""
    errors, found = torch.empty_like(local), torch.empty_like(local)
    columns = zip(factor.diagonal().unbind(), local.unbind(), strict=True)
    for j, (pivot, column) in enumerate(columns):
        code = (column / safe).round_().clamp_(-cmax, cmax)
        found[j] = code
        errors[j] = (column - code * step) / pivot
        local[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return found, errors


def _columns_of_levels(
    local: torch.Tensor, factor: torch.Tensor, levels: torch.Tensor, cmax: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_columns`, to the nearest of levels [N, C], the one of code -cmax first."""
    errors, found = torch.empty_like(local), torch.empty_like(local)
    columns = zip(factor.diagonal().unbind(), local.unbind(), strict=True)
    for j, (pivot, column) in enumerate(columns):
        chosen = (column[:, None] - levels).abs().argmin(1, keepdim=True)
        found[j] = chosen[:, 0] - cmax
        errors[j] = (column - levels.gather(1, chosen)[:, 0]) / pivot
        local[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return found, errors
