"""Repairs of a fit, each of which lowers (w - q) H (w - q)^T row by row: steps, codes, bias.

steps: joint least squares of all groups of a row, the codes frozen
codes: cyclic coordinate descent, c_j <- snap(q_j + ((w - q) H)_j / H_jj), the steps frozen
bias:  b + (W - Q) E[x]
"""

from __future__ import annotations

import torch

from ternc.calibration.gptq import BLOCK
from ternc.calibration.grid import Grid
from ternc.calibration.replay import replay
from ternc.formats.quantized import group_count

STEP_ROUNDS = 3


def refit_steps(
    target: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> None:
    """Sets `grid.steps` to those of least error for these codes; multipliers stay integers.

    A row has G unknowns a, its error is a A a - 2 a r and a constant, A = C H C^T, r = C H w, C the
    codes of each group.

    Args:
        target: W H, fp32 [N, K].
        codes: fp32 [N, K].
    """
    normal, right = _normal_equations(target, codes, hessian, grid)
    if grid.group_size == -1:
        step = right.sum() / normal.sum().clamp(min=torch.finfo(normal.dtype).tiny)
        grid.steps = grid.steps.new_full(grid.steps.shape, float(step)).clamp(min=0)
    elif grid.scale is None:
        grid.steps = _free_steps(normal, right, grid.steps)
    else:
        _descend_multipliers(normal, right, grid)


def refit_codes(
    w: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """One sweep over the columns: codes fp32 [N, K] of no greater error, the steps frozen."""
    step = grid.expanded()
    safe = torch.where(step == 0, 1.0, step).T.contiguous()
    step = step.T.contiguous()
    quantized = (codes.T * step).contiguous()
    # Transposed, as in gptq.py: a column of the weight is one run of memory.
    pull = hessian @ (w.T - quantized)
    diagonal = hessian.diagonal()
    columns = len(quantized)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        before = quantized[part].clone()
        tensors = (
            pull[part].clone(), hessian[part, part], diagonal[part], quantized[part].clone(),
            step[part], safe[part],
        )  # fmt: skip
        (quantized[part],) = replay(_descend_codes, tensors, grid.cmax)
        pull[part.stop :] += hessian[part.stop :, part] @ (before - quantized[part])
    return (quantized / safe).round_().T.contiguous()


def _descend_codes(
    pull: torch.Tensor,
    hessian: torch.Tensor,
    diagonal: torch.Tensor,
    quantized: torch.Tensor,
    step: torch.Tensor,
    safe: torch.Tensor,
    cmax: int,
) -> tuple[torch.Tensor]:
    """Column after column [L, N]: the value of least error; `pull` follows."""
    values = zip(diagonal.unbind(), quantized.unbind(), step.unbind(), safe.unbind(), strict=True)
    for j, (curvature, old, width, divisor) in enumerate(values):
        wish = old + pull[j] / curvature
        value = (wish / divisor).round_().clamp_(-cmax, cmax) * width
        pull.addr_(hessian[:, j], old - value)
        old.copy_(value)
    return (quantized,)


def corrected_bias(
    bias: torch.Tensor, difference: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor:
    """b + (W - Q) E[x]: the mean output stays what it was. Dtype of b.

    Args:
        difference: W - Q, fp32 [N, K].
        mean: E[x], fp32 [K].
    """
    return (bias.float() + difference @ mean).to(bias.dtype)


def _normal_equations(
    target: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [N, G, G] and r [N, G] of a A a - 2 a r, a the steps."""
    size = grid.columns_per_group
    rows, columns = codes.shape
    groups = group_count(columns, size)
    normal = codes.new_empty((rows, groups, groups))
    right = codes.new_empty((rows, groups))
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        product = codes[:, part] @ hessian[part] * codes
        normal[:, group] = torch.stack([p.sum(1) for p in product.split(size, 1)], 1)
        right[:, group] = (target[:, part] * codes[:, part]).sum(1)
    return normal, right


def _free_steps(normal: torch.Tensor, right: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Solves for the steps of every row; a row whose solution is not positive keeps its own."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(1) + torch.finfo(normal.dtype).tiny
    solved = torch.linalg.solve(normal + torch.diag_embed(ridge[:, None].expand_as(right)), right)
    fits = (solved > 0).all(1) & solved.isfinite().all(1)
    return torch.where(fits[:, None], solved, steps)


def _descend_multipliers(normal: torch.Tensor, right: torch.Tensor, grid: Grid) -> None:
    """Coordinate descent on the integers, then the scale by least squares; a few rounds."""
    assert grid.scale is not None
    scale, multiplier = grid.scale, grid.multiplier()
    alive = multiplier > 0
    for _ in range(STEP_ROUNDS):
        for group in range(multiplier.shape[1]):
            others = (normal[:, group] * multiplier).sum(1) * scale
            own = normal[:, group, group].clamp(min=torch.finfo(normal.dtype).tiny)
            change = (right[:, group] - others) / own / scale.clamp(min=torch.finfo(own.dtype).tiny)
            whole = (multiplier[:, group] + change).round().clamp(1, grid.most)
            multiplier[:, group] = torch.where(alive[:, group], whole, 0.0)
        square = torch.einsum("ng,ngh,nh->n", multiplier, normal, multiplier)
        product = (multiplier * right).sum(1)
        scale = torch.where((square > 0) & (product > 0), product / square, scale)
    grid.scale, grid.steps = scale, scale[:, None] * multiplier
