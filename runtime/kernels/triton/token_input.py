"""One token's x, or its integers -> four fields of words of four int8, and their scale.

What the one-token kernel (linear_gemv.py) has every program do for itself: a norm where there is
one, the largest magnitude, the rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ternc.runtime.kernels.triton.fused_rows import normalised
from ternc.runtime.kernels.triton.quantize_act import ROUND_TO_EVEN, magnitude_bits, row_scale
from ternc.runtime.kernels.triton.rotate import rounded


@triton.jit
def field_columns(FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Columns [WORDS, 4] of field FIELD of every chunk."""
    word = tl.arange(0, WORDS)[:, None]
    return word // 16 * 256 + FIELD * 64 + word % 16 * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def load_field(x_ptr, K, FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Columns of field FIELD of every chunk of x as fp32 [WORDS, 4], zeros beyond K."""
    k = field_columns(FIELD, WORDS)
    return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def load_fields(x_ptr, K, WORDS: tl.constexpr):
    """The four fields of x."""
    return (
        load_field(x_ptr, K, 0, WORDS),
        load_field(x_ptr, K, 1, WORDS),
        load_field(x_ptr, K, 2, WORDS),
        load_field(x_ptr, K, 3, WORDS),
    )


@triton.jit
def load_q(q_ptr, K, FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Field FIELD of every chunk of q, given as words of four int8 -> [1, WORDS]."""
    # Loaded with one axis: with two, the compiler would give the weights this load's layout.
    word = tl.arange(0, WORDS)
    place = word // 16 * 64 + FIELD * 16 + word % 16
    return tl.load(q_ptr + place, mask=place < K // 4, other=0)[None, :]


@triton.jit
def load_integers(q_ptr, K, WORDS: tl.constexpr):
    """The four fields of q as words [1, WORDS]."""
    return (
        load_q(q_ptr, K, 0, WORDS),
        load_q(q_ptr, K, 1, WORDS),
        load_q(q_ptr, K, 2, WORDS),
        load_q(q_ptr, K, 3, WORDS),
    )


@triton.jit
def sum_of_fields(a, b, c, d):
    """Sum of all elements of four tiles."""
    return tl.sum(tl.sum((a + b) + (c + d), axis=1), axis=0)


@triton.jit
def normalise(
    x, gain_ptr, bias_ptr, K, eps, offset, dtype: tl.constexpr, NORM: tl.constexpr,
    GAIN: tl.constexpr, BIAS: tl.constexpr, ROUND_FIRST: tl.constexpr, WORDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Fields of x -> those of its norm, fp32 with values of dtype; zeros beyond K."""
    gain = load_fields(gain_ptr, K, WORDS) if GAIN else x
    bias = load_fields(bias_ptr, K, WORDS) if BIAS else x
    mean = 0.0
    if NORM == "layer":
        mean = sum_of_fields(x[0], x[1], x[2], x[3]) / K
    squares = tl.zeros([WORDS, 4], tl.float32)
    centred = ()
    for field in tl.static_range(4):
        value = x[field]
        if NORM == "layer":
            value = tl.where(field_columns(field, WORDS) < K, value - mean, 0.0)
        squares = tl.fma(value, value, squares)
        centred = centred + (value,)
    rstd = tl.math.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / K + eps)
    y = ()
    for field in tl.static_range(4):
        value = normalised(
            centred[field], gain[field], bias[field], rstd, offset, dtype, GAIN, True, BIAS,
            ROUND_FIRST, ASM,
        )  # fmt: skip
        y = y + (rounded(value, dtype, ASM),)
    return y


@triton.jit
def pack_words(x, inverse):
    """x fp32 [WORDS, 4] -> its int8 q as words [1, WORDS]."""
    # Rounded, q is the low byte. A non-finite x leaves any byte: the row's scale is NaN.
    q = (x * inverse + ROUND_TO_EVEN).to(tl.int32, bitcast=True) & 255
    return tl.sum(q << (8 * tl.arange(0, 4))[None, :], axis=1)[None, :]


@triton.jit
def quantize_fields(x):
    """Fields of x -> (four fields of its int8 q as words [1, WORDS], sx)."""
    largest = tl.maximum(
        tl.maximum(magnitude_bits(x[0]), magnitude_bits(x[1])),
        tl.maximum(magnitude_bits(x[2]), magnitude_bits(x[3])),
    )
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    inverse, sx = row_scale(largest.to(tl.float32, bitcast=True), 127.0)
    q = (
        pack_words(x[0], inverse),
        pack_words(x[1], inverse),
        pack_words(x[2], inverse),
        pack_words(x[3], inverse),
    )
    return q, sx
