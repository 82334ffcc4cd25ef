"""A tile of sums -> outputs: scales, bias, residual; and the sum of the parts of a tile.

What the kernels for two tokens and more (linear_gemm.py, linear_int8.py) end with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton.decode import NO_GROUPS
from ternc.runtime.kernels.triton.product import rounded_sum, segment_of, segment_start

TOKEN_TILES_TOGETHER: tl.constexpr = tl.constexpr(16)
"""Programs in flight cover this many token tiles: about a square of the output, shared in L2."""


@triton.jit
def position(tile, tiles_n, tiles_m):
    """(block of weight rows, block of tokens) of a tile."""
    band = tile // (TOKEN_TILES_TOGETHER * tiles_n)
    in_band = tile % (TOKEN_TILES_TOGETHER * tiles_n)
    first_m = band * TOKEN_TILES_TOGETHER
    band_tiles = tl.minimum(tiles_m - first_m, TOKEN_TILES_TOGETHER)
    return in_band // band_tiles, first_m + in_band % band_tiles


@triton.jit
def load_scales(scale_ptr, n, N, ROW_SCALES: tl.constexpr):
    """s fp32 [n] of weight rows n, of which those from N on are any."""
    row = tl.minimum(n, N - 1)
    return tl.load(scale_ptr + (row if ROW_SCALES else row * 0))


@triton.jit
def scaled(total, sx, scale, bias, SHIFT: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr):
    """(float(total) * sx) * s + b [n, m] in fp32; sx [m], s [n], pointers to b [n]."""
    if GROUPS == NO_GROUPS:
        total = total >> SHIFT
    y = total.to(tl.float32) * sx[None, :]
    y = y * scale[:, None]
    if BIAS:
        y = y + tl.load(bias).to(tl.float32)[:, None]
    return y


@triton.jit
def write_tile(
    total, n, m, end, M, N, sx, scale, bias_ptr, y_ptr, residual_ptr,
    SHIFT: tl.constexpr, GROUPS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums int32 [n, m] -> y; rows n from `end` and tokens m from M on are not stored."""
    stored = (n < end)[:, None] & (m[None, :] < M)
    y = scaled(total, sx, scale, bias_ptr + tl.minimum(n, N - 1), SHIFT, GROUPS, BIAS)
    place = (m.to(tl.int64) * N)[None, :] + n[:, None]
    if RESIDUAL:
        y = rounded_sum(y, tl.load(residual_ptr + place, mask=stored, other=0.0))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["M", "tiles_n", "unsplit"])
def combine(
    sx_ptr,
    scale_ptrs,
    bias_ptrs,
    y_ptrs,
    residual_ptr,
    rows,
    partial_ptr,
    M,
    tiles_n,
    unsplit,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS weight rows of a tile: partial sums [tiles, SPLIT, BLOCK_N, BLOCK_M] -> y."""
    tile_n, tile_m = position(unsplit + tl.program_id(0), tiles_n, tl.cdiv(M, BLOCK_M))
    N = segment_of(rows, rows, tile_n, BLOCK_N)
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = (tile_n - segment_start(rows, tile_n, BLOCK_N)) * BLOCK_N + local
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = partial_ptr + tl.program_id(0).to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
    place = local[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(parts + place)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + part * (BLOCK_N * BLOCK_M) + place)
    scale_ptr = segment_of(scale_ptrs, rows, tile_n, BLOCK_N)
    write_tile(
        total, n, m, N, M, N, tl.load(sx_ptr + tl.minimum(m, M - 1)),
        load_scales(scale_ptr, n, N, ROW_SCALES), segment_of(bias_ptrs, rows, tile_n, BLOCK_N),
        segment_of(y_ptrs, rows, tile_n, BLOCK_N), residual_ptr, SHIFT, GROUPS, BIAS, RESIDUAL,
    )  # fmt: skip
