"""fit(w) -> codes, scale, multiplier and fake_quantize(w) -> their values: two launches, nothing
read on the host.

First every row's step or scale and multipliers (the row is held in registers), then, with scales
rounded to what files hold, the codes or values (snap.py). The search is the reference's
(ternc/runtime/ops/fit.py) with sums in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.errors import KernelError
from ternc.formats.quantized import group_count, is_finite
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.snap import MOST_CODES, rounded_codes, snap
from ternc.runtime.ops import fit as fit_op

WIDEST = 16384
"""Padded columns of a row that a program holds; wider rows are fitted by the reference."""

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
def fitted_row(w, steps, TOP: tl.constexpr, PLANES: tl.constexpr):
    """Groups w [G, L] with steps [G] -> (squared error, s, m [G]) with s = max(steps) / TOP."""
    MOST: tl.constexpr = MOST_CODES[PLANES]
    BOUND: tl.constexpr = 127 // MOST
    s = tl.math.div_rn(tl.max(steps, axis=0), TOP * 1.0)
    quotient = tl.where(steps > 0.0, steps / s, 0.0)
    low = tl.minimum(tl.maximum(tl.floor(quotient), 1.0), BOUND * 1.0)
    high = tl.minimum(tl.maximum(tl.ceil(quotient), 1.0), BOUND * 1.0)
    better = squared_error(w, s * low, MOST) <= squared_error(w, s * high, MOST)
    m = tl.where(steps > 0.0, tl.where(better, low, high), 0.0)
    values = codes_of(w, s * m, MOST) * m[:, None]
    square = tl.sum(tl.sum(values * values, axis=1), axis=0)
    s = tl.where(square > 0.0, tl.sum(tl.sum(w * values, axis=1), axis=0) / square, s)
    rest = w - s * values
    return tl.sum(tl.sum(rest * rest, axis=1), axis=0), s, m


@triton.jit
def fit_rows(
    w_ptr,
    scale_ptr,
    multiplier_ptr,
    K,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a row of w [N, K] -> scale fp32 [N], multiplier uint8 [N, G] where GROUPED."""
    n = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, ROWS), tl.arange(0, LENGTH)
    k = group[:, None] * group_size + place[None, :]
    inside = (place[None, :] < group_size) & (k < K)
    if DEPENDENT:
        gdc_wait()
    w = tl.load(w_ptr + n * K + k, mask=inside, other=0.0).to(tl.float32)
    steps = optimal_steps(w, PLANES)
    nothing = tl.sum(tl.sum(w * 0.0, axis=1), axis=0)  # NaN where w is not finite
    if GROUPED:
        COUNT: tl.constexpr = TOP_COUNTS[PLANES]
        error, s, m = fitted_row(w, steps, TOPS[PLANES][0], PLANES)
        for i in tl.static_range(1, COUNT):
            other, s_other, m_other = fitted_row(w, steps, TOPS[PLANES][i], PLANES)
            wins = other < error
            s = tl.where(wins, s_other, s)
            m = tl.where(wins, m_other, m)
            error = tl.where(wins, other, error)
        tl.store(multiplier_ptr + n * groups + group, m.to(tl.uint8), mask=group < groups)
        tl.store(scale_ptr + n, s + nothing)
    else:
        tl.store(scale_ptr + n, tl.sum(steps, axis=0) + nothing)
    if DEPENDENT:
        gdc_launch_dependents()


def scales(
    w: torch.Tensor, planes: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """w [N, K], contiguous -> scale fp32 [N] or [1], not rounded; multiplier uint8 [N, G], None."""
    rows, columns = w.shape
    if group_size == -1:
        return fit_op.optimal_step(w.view(1, -1).float(), planes), None
    groups = group_count(columns, group_size) or 1
    length = launch.power_of_two(group_size or columns)
    padded = launch.power_of_two(groups) * length
    if padded > WIDEST:
        scale, multiplier = fit_op.fit_rows(w, planes, group_size)
        return scale, None if multiplier is None else multiplier.to(torch.uint8)
    scale = torch.empty((rows,), dtype=torch.float32, device=w.device)
    multiplier = None
    if group_size:
        multiplier = torch.empty((rows, groups), dtype=torch.uint8, device=w.device)
    dependent = launch.dependent_launch(w.device)
    fit_rows[(rows,)](
        w,
        scale,
        scale if multiplier is None else multiplier,
        columns,
        groups,
        group_size or columns,
        PLANES=planes,
        GROUPED=group_size > 0,
        ROWS=launch.power_of_two(groups),
        LENGTH=length,
        DEPENDENT=dependent,
        num_warps=max(1, min(16, padded // 1024)),
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return scale, multiplier


def fit(
    w: torch.Tensor, planes: int, group_size: int, refine: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [N, K] -> codes int8, scale, multiplier: the signature of the op. Waits for the device."""
    fit_op.check_fit(w, planes, group_size, refine)
    if refine or w.dtype == torch.float64:
        return fit_op.reference(w, planes, group_size, refine)
    if not is_finite(w):
        raise KernelError(
            f"ternc::fit: weight {list(w.shape)} holds NaN or infinity; repair or exclude it"
        )
    w = w.contiguous()
    fitted, multiplier = scales(w, planes, group_size)
    codes, scale = snap(w, fitted, multiplier, planes, group_size, torch.int8)
    if multiplier is None:
        multiplier = w.new_empty((len(w), 0), dtype=torch.uint8)
    return codes, scale, multiplier


def fake_quantize(w: torch.Tensor, planes: int, group_size: int) -> torch.Tensor:
    """w [N, K] -> s * m * c in w.dtype: the signature of the op; nothing waits for the device.

    A weight that is not finite gives NaN instead of an error.
    """
    fit_op.check_fit(w, planes, group_size, 0)
    w = w.contiguous()
    return snap(w, *scales(w, planes, group_size), planes, group_size, w.dtype)[0]
