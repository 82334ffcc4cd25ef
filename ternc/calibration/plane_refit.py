"""As refit.py, of planes with scales of their own: joint least squares of all G P scales of a row,
the codes frozen; then cyclic coordinate descent over codes, each to the best of its 3^P values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.calibration.gptq import BLOCK
from ternc.calibration.plane_grid import PlaneGrid
from ternc.calibration.replay import replay
from ternc.formats.planewise_fit import levels_of
from ternc.formats.trits import planes_of

ROW_NUMBERS = 1 << 24
"""Numbers of the normal equations, and of the trits, that are held at a time."""

RIDGE = 1e-6


def refit_scales(
    target: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: PlaneGrid
) -> None:
    """Sets `grid.scales` to those of least error for these codes.

    A row whose solution is not positive keeps its own; so does a plane without a trit in a group.

    Args:
        target: W H, fp32 [N, K].
        codes: fp32 [N, K].
    """
    unknowns = grid.scales[0].numel()
    rows = max(1, ROW_NUMBERS // max(unknowns**2, grid.planes * grid.columns))
    found = []
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        trits = planes_of(codes[part], grid.planes).float()
        normal, right = _normal_equations(target[part], trits, hessian, grid.group_size)
        found.append(_solved(normal, right, grid.scales[part].flatten(1)))
    grid.scales = torch.cat(found).view_as(grid.scales)


def _normal_equations(
    target: torch.Tensor, trits: torch.Tensor, hessian: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [N, G P, G P] and r [N, G P] of a A a - 2 a r; trits fp32 [P, N, K], groups outermost."""
    planes, rows, columns = trits.shape
    padded = F.pad(trits, (0, -columns % size)).unflatten(2, (-1, size))  # [P, N, G, g]
    groups = padded.shape[2]
    normal = trits.new_empty((rows, groups, planes, groups, planes))
    right = trits.new_empty((rows, groups, planes))
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        for plane in range(planes):
            own = trits[plane][:, part]
            product = F.pad(own @ hessian[part], (0, -columns % size)).unflatten(1, (-1, size))
            normal[:, group, plane] = (padded * product).sum(3).permute(1, 2, 0)
            right[:, group, plane] = (target[:, part] * own).sum(1)
    return normal.flatten(3).flatten(1, 2), right.flatten(1)


def _solved(normal: torch.Tensor, right: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    diagonal = normal.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(normal.dtype).tiny
    system = normal + torch.diag_embed(torch.where(dead, 1.0, ridge.expand_as(dead)))
    solved = torch.linalg.solve(system, right)
    fits = ((solved > 0) | dead).all(1) & solved.isfinite().all(1)
    return torch.where(fits[:, None] & ~dead, solved, scales)


def refit_codes(
    w: torch.Tensor, codes: torch.Tensor, hessian: torch.Tensor, grid: PlaneGrid
) -> torch.Tensor:
    """One sweep over the columns: codes fp32 [N, K] of no greater error, the scales frozen."""
    levels = levels_of(grid.scales).transpose(0, 1).contiguous()  # [G, N, C]
    codes, quantized = codes.T.contiguous(), grid.values(codes).T.contiguous()
    pull = hessian @ (w.T - quantized)
    diagonal, size = hessian.diagonal(), grid.group_size
    for start in range(0, len(codes), BLOCK):
        part = slice(start, min(start + BLOCK, len(codes)))
        groups = slice(start // size, (part.stop - 1) // size + 1)
        tensors = (
            pull[part].clone(), hessian[part, part], diagonal[part], quantized[part].clone(),
            codes[part].clone(), levels[groups],
        )  # fmt: skip
        before = quantized[part].clone()
        quantized[part], codes[part] = replay(_descend, tensors, grid.cmax, size, start % size)
        pull[part.stop :] += hessian[part.stop :, part] @ (before - quantized[part])
    return codes.T.contiguous()


def _descend(
    pull: torch.Tensor,
    hessian: torch.Tensor,
    diagonal: torch.Tensor,
    quantized: torch.Tensor,
    codes: torch.Tensor,
    levels: torch.Tensor,
    cmax: int,
    size: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column after column [L, N]: the value of least error; `pull` follows.

    Args:
        levels: of the groups of these columns, [G, N, C]; the first begins `offset` columns before.
    """
    for j, (curvature, old, code) in enumerate(
        zip(diagonal.unbind(), quantized.unbind(), codes.unbind(), strict=True)
    ):
        allowed = levels[(offset + j) // size]
        wish = old + pull[j] / curvature
        chosen = (wish[:, None] - allowed).abs().argmin(1, keepdim=True)
        value = allowed.gather(1, chosen)[:, 0]
        changed = value != old
        pull.addr_(hessian[:, j], old - value)
        code.copy_(torch.where(changed, chosen[:, 0].float() - cmax, code))
        old.copy_(value)
    return quantized, codes
