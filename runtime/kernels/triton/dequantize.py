"""dequantize(packed weight) -> W [N, K] = scale * (multiplier * code), any scales, one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.linear_free import load_codes
from ternc.runtime.kernels.triton.weight import Weight

BLOCK_K = 1024


@triton.jit
def dequantize_rows(
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    w_ptr,
    K,
    chunks,
    groups,
    group_size,
    PLANES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    FREE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK columns of a row."""
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    code = load_codes(weight_ptr + row * (chunks * CHUNK_BYTES), column, inside, PLANES)
    value = code.to(tl.float32)
    group = column // group_size if MULTIPLIER or FREE else 0
    if MULTIPLIER:
        value *= tl.load(multiplier_ptr + row * groups + group, mask=inside, other=0).to(tl.float32)
    if FREE:
        value *= tl.load(scale_ptr + row * groups + group, mask=inside, other=0.0)
    elif ROW_SCALES:
        value *= tl.load(scale_ptr + row)
    else:
        value *= tl.load(scale_ptr)
    tl.store(w_ptr + row * K + column, value.to(w_ptr.dtype.element_ty), mask=inside)


def dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """W [N, K] in dtype."""
    w = torch.empty((weight.rows, weight.columns), dtype=dtype, device=weight.bytes.device)
    if not w.numel():
        return w
    block = min(launch.power_of_two(weight.columns), BLOCK_K)
    dependent = launch.dependent_launch(w.device)
    dequantize_rows[(weight.rows, triton.cdiv(weight.columns, block))](
        weight.bytes,
        weight.scale,
        weight.multiplier_or(weight.scale),
        w,
        weight.columns,
        weight.chunks,
        weight.groups,
        max(weight.group_size, 1),
        PLANES=weight.planes,
        MULTIPLIER=weight.multiplier is not None,
        ROW_SCALES=weight.row_scales,
        FREE=weight.free_scales,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=4,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return w
