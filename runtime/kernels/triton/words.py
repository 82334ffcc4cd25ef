"""Rows of a packed weight as 32-bit words: loaded, decoded, multiplied with words of four q.

What the one-token kernel (linear_gemv.py) is made of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ternc.runtime.kernels.triton.decode import (
    ANY_GROUPS,
    HALVES,
    NO_GROUPS,
    SHIFTS,
    prefetch_lines,
)
from ternc.runtime.kernels.triton.product import segment_of, segment_start


@triton.jit
def load_words(weight_ptr, row, CHUNKS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Words of rows -> int32 [n, WORDS]: the first fields, the others, lowest bits; 16 a chunk."""
    CHUNK_WORDS: tl.constexpr = 16 * PLANES if PLANES < 3 else 40
    word = tl.arange(0, WORDS)[None, :]
    # One index: with an axis for chunks the compiler spreads a warp over rows, 64 bytes of each.
    place = word if PLANES == 1 else word // 16 * CHUNK_WORDS + word % 16
    start = weight_ptr + row.to(tl.int64)[:, None] * (CHUNKS * CHUNK_WORDS)
    held = word < CHUNKS * 16
    b0 = tl.load(start + place, mask=held, other=0, eviction_policy="evict_first")
    b1, low = b0, b0
    if PLANES > 1:
        b1 = tl.load(start + 16 + place, mask=held, other=0, eviction_policy="evict_first")
    if PLANES == 3:
        place = word // 16 * CHUNK_WORDS + word % 8
        low = tl.load(start + 32 + place, mask=held, other=0, eviction_policy="evict_first")
    return b0, b1, low


@triton.jit
def rows_of_block(rows, block, BLOCK_N: tl.constexpr):
    """(rows n of block `block` in its weight, the same within the weight, rows of that weight).

    Rows beyond the end repeat the last one.
    """
    N = segment_of(rows, rows, block, BLOCK_N)
    n = (block - segment_start(rows, block, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, tl.minimum(n, N - 1), N


@triton.jit
def prefetch_block(
    weight_ptrs, rows, block, CHUNKS: tl.constexpr, LINES: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ask for the rows of a block; L2 stays coherent, so this needs no order."""
    ROW_WORDS: tl.constexpr = CHUNKS * (16 * PLANES if PLANES < 3 else 40)
    _, row, _ = rows_of_block(rows, block, BLOCK_N)
    weight_ptr = segment_of(weight_ptrs, rows, block, BLOCK_N)
    line = tl.minimum(tl.arange(0, LINES) * 32, ROW_WORDS - 1)
    prefetch_lines(weight_ptr + row.to(tl.int64)[:, None] * ROW_WORDS + line[None, :])


@triton.jit
def load_multipliers(
    multiplier_ptr, row, groups, WORDS: tl.constexpr, HALVES_A_GROUP: tl.constexpr
):
    """Multipliers int32 [n, WORDS / 16] of the two halves of every chunk."""
    half = 2 * tl.arange(0, WORDS // 16)[None, :]
    start = multiplier_ptr + row.to(tl.int64)[:, None] * groups
    last = groups - 1
    m0 = tl.load(start + tl.minimum(half // HALVES_A_GROUP, last))
    m1 = tl.load(start + tl.minimum((half + 1) // HALVES_A_GROUP, last))
    return m0.to(tl.int32), m1.to(tl.int32)


@triton.jit
def for_every_word(values):
    """[n, chunks] -> [n, 16 * chunks]: the value of a chunk for each of its words."""
    n: tl.constexpr = values.shape[0]
    chunks: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], [n, chunks, 16]), [n, chunks * 16])


@triton.jit
def decode_words(b0, b1, low, PLANES: tl.constexpr):
    """Words -> four words of 2**SHIFT * code; the masks are 0xC0, 0xF0, 0x08 in every byte."""
    if PLANES == 1:
        d0 = (b0 << 6) & -1061109568
        d1 = (b0 << 4) & -1061109568
        d2 = (b0 << 2) & -1061109568
        d3 = b0 & -1061109568
    else:
        d0 = (b0 << 4) & -252645136
        d1 = b0 & -252645136
        d2 = (b1 << 4) & -252645136
        d3 = b1 & -252645136
        if PLANES == 3:
            bits = low >> (tl.arange(0, low.shape[1]) % 16 // 8)[None, :]
            d0 = d0 | ((bits << 3) & 134744072)
            d1 = d1 | ((bits << 1) & 134744072)
            d2 = d2 | ((bits >> 1) & 134744072)
            d3 = d3 | ((bits >> 3) & 134744072)
    return d0, d1, d2, d3


@triton.jit
def dot4(a, b, total, ASM: tl.constexpr):
    """total + the dot product of the four int8 of every word of a and b."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def row_sums(
    words, q, halves, row, multiplier_ptr, groups, group_size,
    PLANES: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """int32 [n]: sum over k of q * multiplier * code."""
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    d0, d1, d2, d3 = decode_words(words[0], words[1], words[2], PLANES)
    zero = tl.zeros(d0.shape, tl.int32)
    if GROUPS == ANY_GROUPS:
        word = tl.arange(0, WORDS)[None, :]
        first = word // 16 * 256 + word % 16 * 4
        start = multiplier_ptr + row.to(tl.int64)[:, None] * groups
        last = groups - 1
        m0 = tl.load(start + tl.minimum(first // group_size, last)).to(tl.int32)
        m1 = tl.load(start + tl.minimum((first + 64) // group_size, last)).to(tl.int32)
        m2 = tl.load(start + tl.minimum((first + 128) // group_size, last)).to(tl.int32)
        m3 = tl.load(start + tl.minimum((first + 192) // group_size, last)).to(tl.int32)
        total = (dot4(d0, q[0], zero, ASM) >> SHIFT) * m0
        total += (dot4(d1, q[1], zero, ASM) >> SHIFT) * m1
        total += (dot4(d2, q[2], zero, ASM) >> SHIFT) * m2
        total += (dot4(d3, q[3], zero, ASM) >> SHIFT) * m3
    else:
        total = dot4(d1, q[1], dot4(d0, q[0], zero, ASM), ASM)
        if GROUPS == HALVES:
            # Shifted before it is multiplied: 2**SHIFT * multiplier * sum leaves int32.
            other = dot4(d3, q[3], dot4(d2, q[2], zero, ASM), ASM)
            total = (total >> SHIFT) * for_every_word(halves[0])
            total += (other >> SHIFT) * for_every_word(halves[1])
        else:
            total = dot4(d3, q[3], dot4(d2, q[2], total, ASM), ASM)
    total = tl.sum(total, axis=1)
    return total >> SHIFT if GROUPS == NO_GROUPS else total


@triton.jit
def load_block(
    weight_ptrs, multiplier_ptrs, rows, block, groups,
    CHUNKS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    GROUPS: tl.constexpr, HALVES_A_GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Words and multipliers of a block of rows."""
    _, row, _ = rows_of_block(rows, block, BLOCK_N)
    weight_ptr = segment_of(weight_ptrs, rows, block, BLOCK_N)
    words = load_words(weight_ptr, row, CHUNKS, WORDS, PLANES)
    halves = (row, row)
    if GROUPS == HALVES:
        multiplier_ptr = segment_of(multiplier_ptrs, rows, block, BLOCK_N)
        halves = load_multipliers(multiplier_ptr, row, groups, WORDS, HALVES_A_GROUP)
    return words, halves
