"""dequantize(packed weight) -> W [N, K] = scale * (multiplier * code); embedding -> some rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import INT8
from ternc.runtime import dispatch
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.linear_free import load_codes
from ternc.runtime.kernels.triton.weight import Weight
from ternc.runtime.ops import dequantize as dequantize_op
from ternc.runtime.ops import embedding as embedding_op

BLOCK_K = 1024

LAYOUTS = (21, 22, 23, 28)
"""Those that are resident on CUDA; any other one goes to the reference."""

BYTES: tl.constexpr = tl.constexpr(INT8)
"""PLANES where every code is a byte."""


@triton.jit(do_not_specialize=["N"])
def dequantize_rows(
    indices_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    w_ptr,
    N,
    K,
    row_bytes,
    groups,
    group_size,
    INDEXED: tl.constexpr,
    PLANES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    FREE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program: BLOCK columns of a row; with INDEXED of the row that its index names."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    row = place
    if INDEXED:
        row = tl.load(indices_ptr + place).to(tl.int64)
        tl.device_assert((row >= 0) & (row < N), "ternc::embedding: an index is out of range")
    if PLANES == BYTES:
        code = tl.load(weight_ptr + row * row_bytes + column, mask=inside, other=0)
    else:
        code = load_codes(weight_ptr + row * row_bytes, column, inside, PLANES)
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
    tl.store(w_ptr + place * K + column, value.to(w_ptr.dtype.element_ty), mask=inside)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The packed weight as floats [N, K]: the signature of the op."""
    arguments = (weight, scale, multiplier, out_features, in_features, group_size, layout)
    dequantize_op.check_dequantize(*arguments, dtype)
    if layout not in LAYOUTS:
        return dequantize_op.reference(*arguments, dtype)
    dispatch.record(weight, "triton_dequantize")
    w = weight.new_empty((out_features, in_features), dtype=dtype)
    return _write(Weight.of(*arguments), None, w)


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """indices [...] -> [..., embedding_dim]: the signature of the op.

    An index out of range stops the kernel with a device assertion, as torch's own embedding does.
    """
    arguments = (weight, scale, multiplier, num_embeddings, embedding_dim, group_size, layout)
    embedding_op.check_embedding(indices, *arguments, dtype)
    if layout not in LAYOUTS:
        return embedding_op.reference(indices, *arguments, dtype)
    dispatch.record(weight, "triton_embedding")
    rows = weight.new_empty((indices.numel(), embedding_dim), dtype=dtype)
    _write(Weight.of(*arguments), indices.reshape(-1).contiguous(), rows)
    return rows.view(*indices.shape, embedding_dim)


def _write(weight: Weight, indices: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor:
    """Rows of the weight, or those that the indices name -> w."""
    if not w.numel():
        return w
    block = min(launch.power_of_two(weight.columns), BLOCK_K)
    dependent = launch.dependent_launch(w.device)
    dequantize_rows[(w.shape[0], triton.cdiv(weight.columns, block))](
        weight.scale if indices is None else indices,
        weight.bytes,
        weight.scale,
        weight.multiplier_or(weight.scale),
        w,
        weight.rows,
        weight.columns,
        weight.row_bytes,
        weight.groups,
        max(weight.group_size, 1),
        INDEXED=indices is not None,
        PLANES=weight.planes,
        MULTIPLIER=weight.multiplier is not None,
        ROW_SCALES=weight.row_scales,
        FREE=weight.free_scales,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=4,
        debug=indices is not None,  # compiles the assertion
        sanitize_overflow=False,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return w
