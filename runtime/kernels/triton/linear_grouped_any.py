"""grouped_linear where linear_grouped.py's tiles do not serve: free scales, int8 experts, x in
floating point.

y[m, n] = sum over groups, ascending, of f[n, g] * sum over the group of x[m, k] c[e, n, k], times
sx[m] and s[n]: f is a free scale, a multiplier or 1; sums within a group are int32, or fp32 of a
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

BLOCK_N = 64
BLOCK_K = 64

BYTES: tl.constexpr = tl.constexpr(INT8)
"""PLANES where every code is a byte."""


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
    place = tl.arange(0, BLOCK_K)
    kind: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.int32)
    for group in range(tl.where((expert < E) & (begin < end), groups, 0)):
        last = tl.minimum((group + 1) * group_size, K)
        sums = tl.zeros([BLOCK_M, BLOCK_N], kind)
        for start in range(group * group_size, last, BLOCK_K):
            k = (start + place)[None, :]
            x = tl.load(x_row + k, mask=k < last, other=0)
            if PLANES == BYTES:
                codes = tl.load(weight_row + k, mask=k < last, other=0)
            else:
                codes = load_codes(weight_row, k, k < last, PLANES)
            if INTEGERS:
                sums = tl.dot(x, tl.trans(codes), acc=sums, out_dtype=tl.int32)
            else:
                largest = tl.maximum(largest, tl.max(magnitude_bits(x.to(tl.float32)), axis=1))
                codes = tl.trans(codes.to(x.dtype))
                sums = tl.dot(x, codes, acc=sums, input_precision="tf32x3")
        part = sums.to(tl.float32)
        if FREE:
            part *= tl.load(scale_ptr + row * groups + group)[None, :]
        elif MULTIPLIER:
            part *= tl.load(multiplier_ptr + row * groups + group).to(tl.float32)[None, :]
        total += part
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
    block_m = 16 if each <= 16 or x.dtype == torch.float32 else 64
    # Every tile has a row; every expert, and the rows that have none, ends one early at most.
    tiles = min(tokens, triton.cdiv(tokens, block_m) + experts)
    tiles_n = triton.cdiv(rows, BLOCK_N)
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
        weight.group_size if weight.groups > 1 else weight.columns,
        tiles_n,
        E=experts,
        SLOTS=launch.power_of_two(experts + 1),
        GIVEN=offsets is not None,
        INTEGERS=sx is not None,
        PLANES=weight.planes,
        MULTIPLIER=weight.multiplier is not None,
        FREE=weight.free_scales,
        ROW_SCALES=weight.row_scales,
        BLOCK_N=BLOCK_N,
        BLOCK_M=block_m,
        BLOCK_K=BLOCK_K,
        DEPENDENT=dependent,
        num_warps=4 if block_m == 16 else 8,
        num_stages=2,
        launch_pdl=dependent,
        **launch.EXACT,
    )
