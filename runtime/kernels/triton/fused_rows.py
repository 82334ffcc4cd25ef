"""Kernels that read a row once and write its integers: norm or activation, Hadamard, q and sx.

A row is held in registers as tiles [rows, 64] (rotate.py): statistics, normalised values or
activation, Hadamard transform and integers need no second read. Arithmetic and roundings are those
of the references; sums are taken in another order, which moves q by 1 in few elements. PRECISE,
for few rows: in so few that a row of its own differs in less than 0.1 % of q. Norms of values over
1e19, or under 1e-19 with eps 0, are zeros or NaN; scaled first, many rows take a quarter more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton.quantize_act import (
    bytes_of,
    for_one_rounding,
    magnitude_bits,
    row_scale,
)
from ternc.runtime.kernels.triton.rotate import (
    factors,
    narrowed,
    rotate,
    rounded,
    with_signs,
)


@triton.jit
def tile_columns(tile: tl.constexpr, ROWS: tl.constexpr):
    """Columns [ROWS, 64] of tile `tile` of a row."""
    return tile * (ROWS * 64) + tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]


@triton.jit
def load_tile(row_ptr, tile: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Tile [ROWS, 64] of a row, zeros beyond K."""
    k = tile_columns(tile, ROWS)
    if (tile + 1) * ROWS * 64 <= K:
        values = tl.load(row_ptr + k)
    else:
        values = tl.load(row_ptr + k, mask=k < K, other=0)
    return values


@triton.jit
def store_tile(row_ptr, value, tile: tl.constexpr, K: tl.constexpr):
    """The columns of a tile that a row of K has."""
    ROWS: tl.constexpr = value.shape[0]
    k = tile_columns(tile, ROWS)
    if (tile + 1) * ROWS * 64 <= K:
        tl.store(row_ptr + k, value)
    else:
        tl.store(row_ptr + k, value, mask=k < K)


@triton.jit
def load_tiles(row_ptr, K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """A row as a tuple of tiles [ROWS, 64], zeros beyond K."""
    tiles = ()
    for tile in tl.static_range(TILES):
        tiles = tiles + (load_tile(row_ptr, tile, K, ROWS),)
    return tiles


@triton.jit
def larger(a, b):
    """The greater of two; NaN before all others."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitudes(z, ASM: tl.constexpr):
    """max|z| over the 16 columns that a thread holds (`factors`): [ROWS, 4] of [ROWS, 64]."""
    ROWS: tl.constexpr = z.shape[0]
    z = tl.reshape(tl.abs(z), [ROWS, 4, 16])
    if ASM:
        largest = tl.reduce(z, 2, larger)
    else:  # the interpreter calls `larger` for every pair
        largest = tl.max(magnitude_bits(z), axis=2).to(tl.float32, bitcast=True)
    return largest


@triton.jit
def store_rotated(
    z,
    largest,
    q_row,
    sx_ptr,
    K: tl.constexpr,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    ASM: tl.constexpr,
):
    """Tiles z of a row, of dtype -> q, sx; `largest`: `magnitudes` before they were rounded."""
    if BITS == 8:
        # Rounding keeps the order: the largest one rounds to the largest.
        bits = tl.max(tl.ravel(magnitude_bits(largest), can_reorder=True), axis=0)
        t = bits.to(tl.float32, bitcast=True).to(dtype).to(tl.float32)
    else:
        total = tl.abs(z[0].to(tl.float32)).to(tl.float64)
        for tile in tl.static_range(1, len(z)):
            total += tl.abs(z[tile].to(tl.float32)).to(tl.float64)
        t = (tl.sum(tl.sum(total, axis=1), axis=0) / K).to(tl.float32)
    inverse, scale = row_scale(t, TOP)
    if BITS == 8 and dtype == tl.bfloat16:
        inverse = for_one_rounding(inverse, t)
    for tile in tl.static_range(len(z)):
        store_tile(q_row, bytes_of(z[tile], inverse, LEAST, MOST, ASM), tile, K)
    tl.store(sx_ptr, scale)


@triton.jit
def store_integers(
    h,
    q_row,
    sx_ptr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    ASM: tl.constexpr,
):
    """The one tile h of a row that is not rotated, fp32 with values of its dtype -> q, sx."""
    if BITS == 8:
        t = tl.max(tl.max(magnitude_bits(h), axis=1), axis=0).to(tl.float32, bitcast=True)
    else:
        t = (tl.sum(tl.sum(tl.abs(h).to(tl.float64), axis=1), axis=0) / K).to(tl.float32)
    inverse, scale = row_scale(t, TOP)
    store_tile(q_row, bytes_of(h, inverse, LEAST, MOST, ASM), 0, K)
    tl.store(sx_ptr, scale)


@triton.jit
def rotated_tile(
    value, signs, signs_ptr, left, right, tile: tl.constexpr, K: tl.constexpr,
    SIGNS: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Tile of a row -> fp32; `signs`: its tiles of signs where they are at hand, else empty."""
    if SIGNS and len(signs) > 0:
        value = with_signs(value, signs[tile], ASM)
    elif SIGNS:
        value = with_signs(value, load_tile(signs_ptr, tile, K, value.shape[0]), ASM)
    return rotate(value, left, right, BLOCK, PRECISE, ASM)


@triton.jit
def normalised(
    centred, gain, bias, rstd, offset, dtype: tl.constexpr,
    GAIN: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, ROUND_FIRST: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One tile, minus its mean -> y fp32, to be rounded to dtype; zeros beyond K."""
    n = centred * rstd
    if ROUND_FIRST:
        n = rounded(n, dtype, ASM)
    if GAIN:
        n = n * (gain.to(tl.float32) + offset if OFFSET else gain.to(tl.float32))
    if BIAS:
        n = n + bias.to(tl.float32)
    return n


@triton.jit
def sum_of(tile, PRECISE: tl.constexpr):
    """Sum of a tile [ROWS, 64] of fp32; PRECISE: in float64, but for the first two additions."""
    if PRECISE:
        tile = tl.sum(tl.reshape(tile, [tile.shape[0], 16, 4]), axis=2).to(tl.float64)
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit(do_not_specialize=["M"])
def norm_rows(
    x_ptr,
    gain_ptr,
    bias_ptr,
    signs_ptr,
    y_ptr,
    q_ptr,
    sx_ptr,
    M,
    stride,
    eps,
    offset,
    K: tl.constexpr,
    LAYER: tl.constexpr,
    GAIN: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KEEP: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Programs walk over rows of x [M, K] -> q int8 [M, K], sx [M], and with KEEP y [M, K]."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    left, right = 0, 0
    if BLOCK > 0:
        left, right = factors(dtype, ROWS, BLOCK, PRECISE)
    if DEPENDENT:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    gain = load_tiles(gain_ptr, K, ROWS, TILES) if GAIN else (0,) * TILES
    bias = load_tiles(bias_ptr, K, ROWS, TILES) if BIAS else (0,) * TILES
    signs = load_tiles(signs_ptr, K, ROWS, TILES) if SIGNS and TILES < 3 else ()
    first = tl.program_id(0).to(tl.int64)
    ahead = load_tiles(x_ptr + first * stride, K, ROWS, TILES)
    for row in tl.range(first, M, tl.num_programs(0), num_stages=STAGES):
        if AHEAD and TILES < 3:  # more do not fit the registers
            x = ahead
            following = tl.minimum(row + tl.num_programs(0), M - 1)
            ahead = load_tiles(x_ptr + following * stride, K, ROWS, TILES)
        else:
            x = load_tiles(x_ptr + row * stride, K, ROWS, TILES)
        mean = 0.0
        if LAYER:
            total = x[0].to(tl.float32)
            for tile in tl.static_range(1, TILES):
                total += x[tile].to(tl.float32)
            mean = (sum_of(total, PRECISE) / K).to(tl.float32)
        centred = ()
        squares = tl.zeros([ROWS, 64], tl.float32)
        for tile in tl.static_range(TILES):
            value = x[tile].to(tl.float32)
            if LAYER:
                value -= mean
                if (tile + 1) * ROWS * 64 > K:
                    value = tl.where(tile_columns(tile, ROWS) < K, value, 0.0)
            squares = tl.fma(value, value, squares)
            centred = centred + (value,)
        rstd = tl.math.rsqrt(sum_of(squares, PRECISE) / K + eps).to(tl.float32)
        z = ()
        largest = tl.zeros([ROWS, 4], tl.float32)
        for tile in tl.static_range(TILES):
            y = normalised(
                centred[tile], gain[tile], bias[tile], rstd, offset, dtype, GAIN, OFFSET, BIAS,
                ROUND_FIRST, ASM,
            )  # fmt: skip
            if BLOCK > 0:
                value = narrowed(y, dtype, ASM)
                if KEEP:
                    store_tile(y_ptr + row * K, value, tile, K)
                y = rotated_tile(
                    value, signs, signs_ptr, left, right, tile, K, SIGNS, BLOCK, PRECISE, ASM
                )
                largest = larger(largest, magnitudes(y, ASM))
                z = z + (narrowed(y, dtype, ASM),)
            else:
                y = rounded(y, dtype, ASM)
                if KEEP:
                    store_tile(y_ptr + row * K, y.to(dtype), tile, K)
                store_integers(y, q_ptr + row * K, sx_ptr + row, K, BITS, TOP, LEAST, MOST, ASM)
        if BLOCK > 0:
            store_rotated(
                z, largest, q_ptr + row * K, sx_ptr + row, K, dtype, BITS, TOP, LEAST, MOST, ASM
            )


@triton.jit
def sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)) within a few units in the last place."""
    if ASM:
        # Without the scaling of tiny values, which here are far below a rounding of the result.
        x = tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, ASM: tl.constexpr):
    """The activation function on fp32; NaN stays NaN."""
    if ACTIVATION == "silu":
        x = x * sigmoid(x, ASM)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), ASM)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        x = tl.where(x < 0.0, 0.0, x * x)
    return x


@triton.jit
def load_inputs(
    gate_ptr, up_ptr, row, gate_stride, up_stride,
    tile: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """A tile of a row of gate and of up; gate twice where there is no up."""
    gate = load_tile(gate_ptr + row * gate_stride, tile, K, ROWS)
    up = load_tile(up_ptr + row * up_stride, tile, K, ROWS) if UP else gate
    return gate, up


@triton.jit(do_not_specialize=["M"])
def activation_rows(
    gate_ptr,
    up_ptr,
    signs_ptr,
    q_ptr,
    sx_ptr,
    M,
    gate_stride,
    up_stride,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UP: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Programs walk over rows of gate, up [M, K] -> q int8 [M, K], sx [M]."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    left, right = 0, 0
    if BLOCK > 0:
        left, right = factors(dtype, ROWS, BLOCK, PRECISE)
    if DEPENDENT:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    signs = load_tiles(signs_ptr, K, ROWS, TILES) if SIGNS and TILES < 3 else ()
    first = tl.program_id(0).to(tl.int64)
    gate, up = load_inputs(gate_ptr, up_ptr, first, gate_stride, up_stride, 0, K, ROWS, UP)
    for row in tl.range(first, M, tl.num_programs(0), num_stages=STAGES):
        z = ()
        largest = tl.zeros([ROWS, 4], tl.float32)
        for tile in tl.static_range(TILES):
            if AHEAD:
                value, factor = gate, up
                place = row
                if tile + 1 == TILES:
                    place = tl.minimum(row + tl.num_programs(0), M - 1)
                gate, up = load_inputs(
                    gate_ptr, up_ptr, place, gate_stride, up_stride, (tile + 1) % TILES, K, ROWS, UP
                )
            else:
                value, factor = load_inputs(
                    gate_ptr, up_ptr, row, gate_stride, up_stride, tile, K, ROWS, UP
                )
            if ACTIVATION != "none":
                value = activated(value.to(tl.float32), ACTIVATION, ASM)
                value = rounded(value, dtype, ASM) if UP else narrowed(value, dtype, ASM)
            if UP:
                value = narrowed(value.to(tl.float32) * factor.to(tl.float32), dtype, ASM)
            if BLOCK > 0:
                y = rotated_tile(
                    value, signs, signs_ptr, left, right, tile, K, SIGNS, BLOCK, PRECISE, ASM
                )
                largest = larger(largest, magnitudes(y, ASM))
                z = z + (narrowed(y, dtype, ASM),)
            else:
                store_integers(
                    value.to(tl.float32), q_ptr + row * K, sx_ptr + row, K, BITS, TOP, LEAST, MOST,
                    ASM,
                )  # fmt: skip
        if BLOCK > 0:
            store_rotated(
                z, largest, q_ptr + row * K, sx_ptr + row, K, dtype, BITS, TOP, LEAST, MOST, ASM
            )
