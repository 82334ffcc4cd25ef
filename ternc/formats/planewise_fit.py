"""Units w [M, L] -> scales [M, P] of planes of their own: joint alternating least squares.

    T-step: every weight to the nearest of the 3^P sums +-a_0 +-a_1 ... of its unit
    a-step: (T^T D T) a = T^T D w, D the metric of the columns

From two starts, the balanced ladder a_p = step 3^(P - 1 - p) and the greedy residual; the better of
the two ends is kept.
"""

from __future__ import annotations

import torch

from ternc.config import CODE_MAX
from ternc.formats.trits import planes_of

CHUNK = 1 << 18
"""Weights fitted at a time: bounds the temporaries."""

RIDGE = 1e-6
"""Part of the mean diagonal added to the normal equations: two planes may be alike."""


def ladder(step: torch.Tensor, planes: int) -> torch.Tensor:
    """Steps [M] of a balanced ternary grid -> its plane scales [M, P]."""
    return step[:, None] * 3.0 ** torch.arange(planes - 1, -1, -1, device=step.device)


def fit_scales(
    w: torch.Tensor, step: torch.Tensor, planes: int, rounds: int, metric: torch.Tensor | None
) -> torch.Tensor:
    """Scales fp32 [M, P], not negative, the largest first.

    Args:
        w: fp32 [M, L].
        step: of the balanced grid that is the first start, [M].
        rounds: of the alternation; 0 gives the ladder.
        metric: weight of the squared error of each column, fp32 [L]; None: all alike.
    """
    metric = w.new_ones(w.shape[1]) if metric is None else metric
    size = max(1, CHUNK // w.shape[1])
    parts = zip(w.split(size), step.split(size), strict=True)
    return torch.cat([_fit(*part, planes, rounds, metric) for part in parts])


def nearest(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes fp32 [M, L] of the values nearest to w, on the sums of scales [M, P]."""
    planes, size = scales.shape[1], max(1, CHUNK // w.shape[1])
    parts = zip(w.split(size), levels_of(scales).split(size), strict=True)
    return torch.cat([_snap(*part) for part in parts]) - CODE_MAX[planes]


def levels_of(scales: torch.Tensor) -> torch.Tensor:
    """Scales [..., P] -> the value of every code [..., 3^P], code -CODE_MAX first."""
    return scales @ _all_trits(scales.shape[-1], scales.device)


def _all_trits(planes: int, device: torch.device) -> torch.Tensor:
    """fp32 [P, 3^P]: the trits of every code."""
    codes = torch.arange(-CODE_MAX[planes], CODE_MAX[planes] + 1, device=device)
    return planes_of(codes[None], planes)[:, 0].float()


def _snap(w: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index fp32 [M, L] of the level nearest to each weight; that of code 0 where all are 0."""
    ordered, order = levels.sort(1)
    borders = (ordered[:, 1:] + ordered[:, :-1]) / 2
    found = order.gather(1, torch.searchsorted(borders, w.contiguous())).float()
    return torch.where((ordered[:, -1:] == 0), float(levels.shape[1] // 2), found)


def _fit(
    w: torch.Tensor, step: torch.Tensor, planes: int, rounds: int, metric: torch.Tensor
) -> torch.Tensor:
    best = ladder(step, planes)
    if not rounds:
        return best
    error = torch.full_like(step, torch.inf)
    for start in (best, _greedy(w, planes)):
        scales = start
        for _ in range(rounds):
            scales = _least_squares(w, nearest(w, scales), scales, metric)
        values = levels_of(scales).gather(1, (nearest(w, scales) + CODE_MAX[planes]).long())
        squares = (w - values).square() @ metric
        best = torch.where((squares < error)[:, None], scales, best)
        error = torch.minimum(squares, error)
    return best


def _least_squares(
    w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, metric: torch.Tensor
) -> torch.Tensor:
    """Scales of least error for these codes, made positive and sorted: the levels stay the same."""
    planes = scales.shape[1]
    trits = planes_of(codes, planes).float().permute(1, 0, 2)  # [M, P, L]
    weighted = trits * metric
    normal = weighted @ trits.transpose(1, 2)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(w.dtype).tiny
    normal = normal + torch.diag_embed(ridge[:, None].expand_as(scales))
    solved = torch.linalg.solve(normal, (weighted @ w[..., None]).squeeze(2))
    kept = torch.where(solved.isfinite().all(1, keepdim=True), solved, scales)
    return kept.abs().sort(1, descending=True).values


def _greedy(w: torch.Tensor, planes: int) -> torch.Tensor:
    """Plane after plane of what those before it left: threshold 0.75 mean|w|."""
    left, scales = w.clone(), []
    for _ in range(planes):
        plane = left.sign() * (left.abs() > 0.75 * left.abs().mean(1, keepdim=True))
        scale = (left * plane).sum(1) / plane.abs().sum(1).clamp(min=1)
        left -= scale[:, None] * plane
        scales.append(scale)
    return torch.stack(scales, 1).sort(1, descending=True).values
