"""Which rows of x, and of which expert, a tile of a grouped product has: found on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, chosen):
    """The entry of a vector where `chosen`."""
    return tl.sum(tl.where(chosen, values, 0), axis=0)


@triton.jit
def larger_of(a, b):
    return tl.maximum(a, b)


@triton.jit
def share_of(offsets_ptr, tile, M, E: tl.constexpr, GIVEN: tl.constexpr, SLOTS: tl.constexpr,
             BLOCK_M: tl.constexpr):  # fmt: skip
    """(expert, first row of x, end) of a tile of rows; expert E: rows of x that have none.

    SLOTS: a power of two above E. Where no tile is left, the first row is the end.
    """
    slot = tl.arange(0, SLOTS)
    if GIVEN:
        ends = tl.load(offsets_ptr + slot, mask=slot < E, other=0)
        before = tl.load(offsets_ptr + slot - 1, mask=(slot > 0) & (slot <= E), other=0)
    else:
        ends, before = (slot + 1) * (M // E), slot * (M // E)
    ends = tl.where(slot < E, tl.minimum(ends, M), M)
    begins = tl.minimum(tl.associative_scan(before, 0, larger_of), M)
    count = tl.where(slot <= E, tl.maximum(ends - begins, 0), 0)
    tiles = tl.cdiv(count, BLOCK_M)
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile).to(tl.int32), axis=0)
    chosen = slot == expert  # none, where no tile is left
    end = pick(ends, chosen)
    begin = pick(begins, chosen) + (tile - pick(behind - tiles, chosen)) * BLOCK_M
    return expert, tl.minimum(begin, end), end
