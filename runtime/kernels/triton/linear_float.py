"""y[m, n] = (sum_k x[m, k] W[n, k]) * s[n] + b[n] with x in floating point, accumulated in fp32.

Codes times multipliers are at most 127: exact in fp16 and bf16. With a scale for every group (free
scales) the codes take theirs in fp32, and so does the product. A row of x with NaN or infinity
gives a NaN row, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import INT8
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.decode import NO_GROUPS, SHIFTS, load_chunk
from ternc.runtime.kernels.triton.product import (
    Product,
    rounded_sum,
    segment_of,
    segment_start,
)
from ternc.runtime.kernels.triton.quantize_act import INFINITY_BITS, magnitude_bits

BLOCK_N = 64

BYTES: tl.constexpr = tl.constexpr(INT8)
"""PLANES where every code is a byte."""


@triton.jit(do_not_specialize=["M", "chunks", "groups", "group_size"])
def gemm_float(
    x_ptr,
    weight_ptrs,
    scale_ptrs,
    multiplier_ptrs,
    bias_ptrs,
    y_ptrs,
    residual_ptr,
    rows,
    M,
    K,
    row_bytes,
    chunks,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    FREE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program a tile [BLOCK_M, BLOCK_N] of y."""
    SHIFT: tl.constexpr = 0 if PLANES == BYTES else SHIFTS[PLANES]
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    N = segment_of(rows, rows, tile_n, BLOCK_N)
    n = (tile_n - segment_start(rows, tile_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr = segment_of(weight_ptrs, rows, tile_n, BLOCK_N)
    multiplier_ptr = segment_of(multiplier_ptrs, rows, tile_n, BLOCK_N)
    scale_ptr = segment_of(scale_ptrs, rows, tile_n, BLOCK_N)
    y_ptr = segment_of(y_ptrs, rows, tile_n, BLOCK_N)
    token = tl.where(m < M, m, tl.minimum(m - M, M - 1))
    row = tl.where(n < N, n, tl.minimum(n - N, N - 1))
    k = tl.arange(0, 256)
    weight_row = weight_ptr + (row.to(tl.int64) * row_bytes)[:, None]
    multiplier_row = multiplier_ptr + (row.to(tl.int64) * groups)[:, None]
    scale_row = scale_ptr + (row.to(tl.int64) * groups)[:, None]
    x_tile = x_ptr + (token.to(tl.int64) * K)[:, None] + k[None, :]
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.int32)
    for chunk in range(chunks):
        inside = (chunk * 256 + k)[None, :] < K
        x = tl.load(x_tile + chunk * 256, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude_bits(x.to(tl.float32)), axis=1))
        if PLANES == BYTES:
            w = tl.load(weight_row + (chunk * 256 + k)[None, :], mask=inside, other=0)
        else:
            w = load_chunk(
                weight_row, multiplier_row, chunk, groups, group_size, PLANES, GROUPS,
                HALVES_A_GROUP, ASM,
            )  # fmt: skip
        if FREE:
            group = tl.minimum((chunk * 256 + k) // group_size, groups - 1)[None, :]
            w = w.to(tl.float32) * tl.load(scale_row + group)
            x = x.to(tl.float32)
        total = tl.dot(x, tl.trans(w.to(x.dtype)), acc=total, input_precision="tf32x3")
    if GROUPS == NO_GROUPS:
        total = total * (1.0 / (1 << SHIFT))
    y = total
    if not FREE:
        y = total * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))[None, :]
    if BIAS:
        bias_ptr = segment_of(bias_ptrs, rows, tile_n, BLOCK_N)
        y = y + tl.load(bias_ptr + row).to(tl.float32)[None, :]
    y = tl.where((largest < INFINITY_BITS)[:, None], y, float("nan"))
    place = (m.to(tl.int64) * N)[:, None] + n[None, :]
    stored = (m[:, None] < M) & (n[None, :] < N)
    if RESIDUAL:
        y = rounded_sum(y, tl.load(residual_ptr + place, mask=stored, other=0.0))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=stored)


def linear_float(x: torch.Tensor, product: Product) -> None:
    """x [M, K], contiguous -> product.outputs: one launch."""
    weight, tokens = product.joint, x.shape[0]
    long = x.dtype == torch.float32 or weight.free_scales
    block_m = 16 if tokens <= 16 or long else 64
    dependent = launch.dependent_launch(x.device)
    gemm_float[(triton.cdiv(tokens, block_m) * product.blocks(BLOCK_N),)](
        x_ptr=x,
        **product.pointers(torch.int8),
        M=tokens,
        K=weight.columns,
        row_bytes=weight.row_bytes,
        chunks=weight.chunks,
        groups=weight.groups,
        group_size=weight.group_size,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=product.weights[0].row_scales,
        FREE=weight.free_scales,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_M=block_m,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=8 if long else 4,
        num_stages=2,
        launch_pdl=dependent,
        **launch.EXACT,
    )
