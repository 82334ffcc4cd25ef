"""Groups of a row, in registers -> their steps of least error; scale and multipliers of the row.

The search of ternc/runtime/ops/fit.py with sums in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ternc.runtime.kernels.triton.snap import MOST_CODES, rounded_codes
from ternc.runtime.ops import fit as fit_op

RATIOS: tl.constexpr = tl.constexpr(fit_op.RATIOS)
RATIO_COUNT: tl.constexpr = tl.constexpr(len(fit_op.RATIOS))
_TOPS = ((), *fit_op.TOP_MULTIPLIERS.values())
TOPS: tl.constexpr = tl.constexpr(_TOPS)
TOP_COUNTS: tl.constexpr = tl.constexpr(tuple(map(len, _TOPS)))
"""By planes: multipliers tried for the group of largest step."""


@triton.jit
def codes_of(w, step, MOST: tl.constexpr):
    """Codes of w [G, L] at steps [G], by a reciprocal: for the search; 0 where a step is 0."""
    inverse = tl.where(step > 0.0, 1.0 / step, 0.0)
    return rounded_codes(w * inverse[:, None], MOST)


@triton.jit
def squared_error(w, step, MOST: tl.constexpr):
    """Sum over columns of (w - step * code)**2, [G]."""
    rest = w - step[:, None] * codes_of(w, step, MOST)
    return tl.sum(rest * rest, axis=1)


@triton.jit
def least_squares(w, values, default):
    """argmin over a of |w - a * values|**2, [G]; `default` where values are 0."""
    square = tl.sum(values * values, axis=1)
    return tl.where(square > 0.0, tl.sum(w * values, axis=1) / square, default)


@triton.jit
def optimal_steps(w, PLANES: tl.constexpr):
    """Step [G] of least squared error of every row of w fp32 [G, L]; padding is 0."""
    MOST: tl.constexpr = MOST_CODES[PLANES]
    magnitude = tl.abs(w)
    if PLANES == 1:
        prefix = tl.cumsum(tl.sort(magnitude, descending=True), axis=1)
        kept = tl.arange(0, w.shape[1])[None, :] + 1
        gain = prefix * prefix / kept.to(tl.float32)
        best = tl.max(gain, axis=1)
        count = tl.min(tl.where(gain == best[:, None], kept, w.shape[1] + 1), axis=1)
        total = tl.sum(tl.where(kept == count[:, None], prefix, 0.0), axis=1)
        step = total / count.to(tl.float32)
    else:
        largest = tl.max(magnitude, axis=1) / MOST
        step = largest
        error = tl.full(largest.shape, float("inf"), tl.float32)
        for i in tl.static_range(RATIO_COUNT):
            candidate = largest * RATIOS[i]
            squares = squared_error(magnitude, candidate, MOST)
            step = tl.where(squares < error, candidate, step)
            error = tl.minimum(squares, error)
        for _ in tl.static_range(2):
            step = least_squares(magnitude, codes_of(magnitude, step, MOST), step)
    return step


@triton.jit
def multipliers_of(w, steps, s, PLANES: tl.constexpr):
    """Groups w [G, L] with steps [G] -> m [G], the better of floor and ceil of steps / s."""
    MOST: tl.constexpr = MOST_CODES[PLANES]
    BOUND: tl.constexpr = 127 // MOST
    quotient = tl.where(steps > 0.0, steps / s, 0.0)
    low = tl.minimum(tl.maximum(tl.floor(quotient), 1.0), BOUND * 1.0)
    high = tl.minimum(tl.maximum(tl.ceil(quotient), 1.0), BOUND * 1.0)
    better = squared_error(w, s * low, MOST) <= squared_error(w, s * high, MOST)
    return tl.where(steps > 0.0, tl.where(better, low, high), 0.0)


@triton.jit
def fitted_row(w, steps, TOP: tl.constexpr, PLANES: tl.constexpr):
    """Groups w [G, L] with steps [G] -> (squared error, s, m [G]) with s = max(steps) / TOP."""
    MOST: tl.constexpr = MOST_CODES[PLANES]
    s = tl.math.div_rn(tl.max(steps, axis=0), TOP * 1.0)
    m = multipliers_of(w, steps, s, PLANES)
    values = codes_of(w, s * m, MOST) * m[:, None]
    square = tl.sum(tl.sum(values * values, axis=1), axis=0)
    s = tl.where(square > 0.0, tl.sum(tl.sum(w * values, axis=1), axis=0) / square, s)
    rest = w - s * values
    return tl.sum(tl.sum(rest * rest, axis=1), axis=0), s, m
