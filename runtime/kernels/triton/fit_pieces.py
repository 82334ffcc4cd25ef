"""Rows of groups that do not fit a program -> scales and multipliers: fit.py's search, a row in
pieces of whole groups. First every group's step, then a program a row walks over its pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.formats.quantized import group_count
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.fit_row import (
    TOP_COUNTS,
    TOPS,
    codes_of,
    multipliers_of,
    optimal_steps,
)
from ternc.runtime.kernels.triton.snap import MOST_CODES

PIECE = 8192
"""Padded columns that a program holds at a time; of one group up to twice as many."""


@triton.jit
def load_groups(
    w_ptr, n, first, K, group_size, ROWS: tl.constexpr, LENGTH: tl.constexpr
):  # fmt: skip
    """Groups `first` and following of row n of w [N, K] as fp32 [ROWS, LENGTH], zeros beyond."""
    place = tl.arange(0, LENGTH)[None, :]
    k = (first + tl.arange(0, ROWS))[:, None] * group_size + place
    inside = (place < group_size) & (k < K)
    return tl.load(w_ptr + n * K + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def group_steps(
    w_ptr, step_ptr, K, groups, group_size, pieces,
    PLANES: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a piece of a row -> steps fp32 [N, G]; NaN where a group is not finite."""
    n = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * ROWS
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    w = load_groups(w_ptr, n, first, K, group_size, ROWS, LENGTH)
    steps = optimal_steps(w, PLANES) + tl.sum(w * 0.0, axis=1)
    group = first + tl.arange(0, ROWS)
    tl.store(step_ptr + n * groups + group, steps, mask=group < groups)


@triton.jit
def fit_pieces(
    w_ptr, step_ptr, scale_ptr, multiplier_ptr, K, groups, group_size, pieces,
    PLANES: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a row of w [N, K] with steps [N, G] -> scale [N], multiplier uint8 [N, G]."""
    MOST: tl.constexpr = MOST_CODES[PLANES]
    COUNT: tl.constexpr = TOP_COUNTS[PLANES]
    n = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, ROWS)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    largest = tl.zeros([ROWS], tl.float32)
    nothing = tl.zeros([ROWS], tl.float32)
    for piece in range(pieces):
        group = piece * ROWS + own
        steps = tl.load(step_ptr + n * groups + group, mask=group < groups, other=0.0)
        largest = tl.maximum(largest, steps)
        nothing += steps * 0.0
    top = tl.max(largest, axis=0)
    best, scale, chosen = -1.0, 0.0, 0.0
    for i in tl.static_range(COUNT):
        s = tl.math.div_rn(top, TOPS[PLANES][i] * 1.0)
        products = tl.zeros([ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for piece in range(pieces):
            group = piece * ROWS + own
            steps = tl.load(step_ptr + n * groups + group, mask=group < groups, other=0.0)
            w = load_groups(w_ptr, n, piece * ROWS, K, group_size, ROWS, LENGTH)
            m = multipliers_of(w, steps, s, PLANES)
            values = codes_of(w, s * m, MOST) * m[:, None]
            products += tl.sum(w * values, axis=1)
            squares += tl.sum(values * values, axis=1)
        product, square = tl.sum(products, axis=0), tl.sum(squares, axis=0)
        refit = tl.where(square > 0.0, product / square, s)
        gain = product * refit  # how much the error is below that of zeros
        wins = gain > best
        best = tl.where(wins, gain, best)
        scale = tl.where(wins, refit, scale)
        chosen = tl.where(wins, s, chosen)
    for piece in range(pieces):
        group = piece * ROWS + own
        steps = tl.load(step_ptr + n * groups + group, mask=group < groups, other=0.0)
        w = load_groups(w_ptr, n, piece * ROWS, K, group_size, ROWS, LENGTH)
        m = multipliers_of(w, steps, chosen, PLANES)
        tl.store(multiplier_ptr + n * groups + group, m.to(tl.uint8), mask=group < groups)
    tl.store(scale_ptr + n, scale + tl.sum(nothing, axis=0))


def scales_of_groups(
    w: torch.Tensor, planes: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K], contiguous -> scale fp32 [N], not rounded, and multiplier uint8 [N, G]."""
    rows, columns = w.shape
    groups, length = group_count(columns, group_size), launch.power_of_two(group_size)
    together = max(1, PIECE // length)
    pieces = triton.cdiv(groups, together)
    steps = torch.empty((rows, groups), dtype=torch.float32, device=w.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=w.device)
    multiplier = torch.empty((rows, groups), dtype=torch.uint8, device=w.device)
    dependent = launch.dependent_launch(w.device)
    numbers = (columns, groups, group_size, pieces)
    constants = {
        "PLANES": planes,
        "ROWS": together,
        "LENGTH": length,
        "DEPENDENT": dependent,
        "num_warps": max(1, min(16, together * length // 1024)),
        "launch_pdl": dependent,
        **launch.EXACT,
    }
    group_steps[(rows * pieces,)](w, steps, *numbers, **constants)
    fit_pieces[(rows,)](w, steps, scale, multiplier, *numbers, **constants)
    return scale, multiplier
