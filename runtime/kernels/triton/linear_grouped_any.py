"""grouped_linear where linear_grouped.py's tiles do not serve: free scales, int8 experts, x in
floating point.

y[m, n] = sum over k of x[m, k] m[e, n, g] c[e, n, k], times sx[m] and s[e, n]; of free scales the
sum over groups, ascending, of s[e, n, g] times the sum over the group. Sums are int32, or fp32 of a
floating-point x. Programs find their expert on the device. Simple, not tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import INT8
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.expert_tiles import share_of
from ternc.runtime.kernels.triton.linear_free import load_codes
from ternc.runtime.kernels.triton.quantize_act import INFINITY_BITS, magnitude_bits
from ternc.runtime.kernels.triton.weight import Weight

BLOCK_K = 64

BYTES: tl.constexpr = tl.constexpr(INT8)
"""PLANES where every code is a byte."""


@triton.jit
def sums_between(
    x_row, weight_row, multiplier_row, first, last, group_size, INTEGERS: tl.constexpr,
    PLANES: tl.constexpr, MULTIPLIER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(sums over columns from `first` to `last`, largest |x| in bits where x is no integer)."""
    BLOCK_M: tl.constexpr = x_row.shape[0]
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGERS else tl.float32)
    largest = tl.zeros([BLOCK_M], tl.int32)
    for start in range(first, last, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_row + k, mask=k < last, other=0)
        if PLANES == BYTES:
            codes = tl.load(weight_row + k, mask=k < last, other=0)
        else:
            codes = load_codes(weight_row, k, k < last, PLANES)
        if MULTIPLIER:  # at most 127 with it
            if ALIGNED:  # one for all of these columns
                m = tl.load(multiplier_row + start // group_size)
            else:
                m = tl.load(multiplier_row + k // group_size, mask=k < last, other=0)
            codes *= m.to(tl.int8)
        if INTEGERS:
            sums = tl.dot(x, tl.trans(codes), acc=sums, out_dtype=tl.int32)
        else:
            largest = tl.maximum(largest, tl.max(magnitude_bits(x.to(tl.float32)), axis=1))
            sums = tl.dot(x, tl.trans(codes.to(x.dtype)), acc=sums, input_precision="tf32x3")
    return sums, largest


@triton.jit(do_not_specialize=["M", "groups", "tiles_n"])
def gemm_grouped_any(
    x_ptr,
    sx_ptr,
    offsets_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    y_ptr,
    M,
    N,
    padded,
    K,
    x_stride,
    row_bytes,
    groups,
    group_size,
    tiles_n,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    GIVEN: tl.constexpr,
    INTEGERS: tl.constexpr,
    PLANES: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    ALIGNED: tl.constexpr,
    FREE: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a tile [BLOCK_M, BLOCK_N] of y of one expert; `padded` weight rows each."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    tile, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    expert, begin, end = share_of(offsets_ptr, tile, M, E, GIVEN, SLOTS, BLOCK_M)
    m = begin + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.maximum(tl.minimum(m, end - 1), 0)
    row = tl.minimum(expert, E - 1).to(tl.int64) * padded + tl.minimum(n, N - 1)
    weight_row = weight_ptr + (row * row_bytes)[:, None]
    x_row = x_ptr + (token.to(tl.int64) * x_stride)[:, None]
    if FREE:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        largest = tl.zeros([BLOCK_M], tl.int32)
        for group in range(tl.where(begin < end, groups, 0)):
            last = tl.minimum((group + 1) * group_size, K)
            sums, seen = sums_between(
                x_row, weight_row, multiplier_ptr, group * group_size, last, group_size, INTEGERS,
                PLANES, MULTIPLIER, ALIGNED, BLOCK_K,
            )  # fmt: skip
            total += sums.to(tl.float32) * tl.load(scale_ptr + row * groups + group)[None, :]
            largest = tl.maximum(largest, seen)
    else:
        multiplier_row = multiplier_ptr + (row * groups)[:, None]
        sums, largest = sums_between(
            x_row, weight_row, multiplier_row, 0, tl.where(begin < end, K, 0), group_size, INTEGERS,
            PLANES, MULTIPLIER, ALIGNED, BLOCK_K,
        )  # fmt: skip
        total = sums.to(tl.float32)
    if INTEGERS:
        total = total * tl.load(sx_ptr + token)[:, None]
    else:
        total = tl.where((largest < INFINITY_BITS)[:, None], total, float("nan"))
    if not FREE:
        total = total * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))[None, :]
    total = tl.where(expert < E, total, 0.0)
    stored = (m < end)[:, None] & (n < N)[None, :]
    out = (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=stored)


def gemm_any(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weight: Weight,
    experts: int,
    padded: int,
    y: torch.Tensor,
) -> None:
    """x [M, K] floating point, or integers [M, >= K] with scales sx [M] -> y [M, N]: one launch."""
    tokens, rows = y.shape
    each = -(-tokens // experts)
    block_m = 128 if each > 128 and not weight.free_scales else 64
    if each <= 16 or x.dtype == torch.float32:
        block_m = 16
    block_n = 128 if block_m == 128 else 64
    # Every tile has a row; every expert, and the rows that have none, ends one early at most.
    tiles = min(tokens, triton.cdiv(tokens, block_m) + experts)
    tiles_n = triton.cdiv(rows, block_n)
    dependent = launch.dependent_launch(x.device)
    gemm_grouped_any[(tiles * tiles_n,)](
        x,
        weight.scale if sx is None else sx,
        weight.scale if offsets is None else offsets.contiguous(),
        weight.bytes,
        weight.scale,
        weight.multiplier_or(weight.scale),
        y,
        tokens,
        rows,
        padded,
        weight.columns,
        x.shape[1],
        weight.row_bytes,
        weight.groups,
        weight.group_size or weight.columns,
        tiles_n,
        E=experts,
        SLOTS=launch.power_of_two(experts + 1),
        GIVEN=offsets is not None,
        INTEGERS=sx is not None,
        PLANES=weight.planes,
        MULTIPLIER=weight.multiplier is not None,
        ALIGNED=weight.group_size % BLOCK_K == 0,
        FREE=weight.free_scales,
        ROW_SCALES=weight.row_scales,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=BLOCK_K,
        DEPENDENT=dependent,
        num_warps=4 if block_m == 16 else 8,
        num_stages=3,
        launch_pdl=dependent,
        **launch.EXACT,
    )
