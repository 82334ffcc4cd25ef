"""fit(w) -> codes, scale, multiplier and fake_quantize(w) -> their values: two launches, nothing
read on the host.

First every row's step or scale and multipliers (fit_row.py: the row is held in registers; long rows
of groups: fit_pieces.py; long rows and whole weights of one scale: fit_sums.py), then, with scales
rounded to what files hold, the codes or values (snap.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.errors import KernelError
from ternc.formats.quantized import group_count, is_finite
from ternc.runtime.kernels.triton import fit_sums, launch
from ternc.runtime.kernels.triton.fit_pieces import scales_of_groups
from ternc.runtime.kernels.triton.fit_row import TOP_COUNTS, TOPS, fitted_row, optimal_steps
from ternc.runtime.kernels.triton.snap import snap
from ternc.runtime.ops import fit as fit_op

WIDEST = 16384
"""Padded columns of a row that a program holds."""


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
        return fit_sums.optimal_steps(w.view(1, -1), planes), None
    groups = group_count(columns, group_size) or 1
    length = launch.power_of_two(group_size or columns)
    padded = launch.power_of_two(groups) * length
    if padded > WIDEST:
        if not group_size:
            return fit_sums.optimal_steps(w, planes), None
        if length <= WIDEST:
            return scales_of_groups(w, planes, group_size)
        scale, multiplier = fit_op.fit_rows(w, planes, group_size)  # of groups of over 16,384
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
