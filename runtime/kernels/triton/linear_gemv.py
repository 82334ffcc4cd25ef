"""y[n] = (sum_k q[k] W[n, k]) * sx * s[n] + b[n] for one row of x: one kernel, no tensor cores.

Every program loads its weights first, then quantises all of x (absmax, int8) while they arrive,
then multiplies words of four codes with dp4a. Nothing is shared between programs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.decode import (
    ANY_GROUPS,
    HALVES,
    NO_GROUPS,
    SHIFTS,
    prefetch_lines,
)
from ternc.runtime.kernels.triton.quantize_act import ROUND_TO_EVEN, magnitude_bits, row_scale
from ternc.runtime.kernels.triton.weight import Weight

MAX_CHUNKS = 128
"""Longest row (32,768 columns) of which a program holds the quantised x in registers."""


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """How the rows are cut."""

    rows: int
    """Weight rows that a program holds at a time."""
    warps: int
    resident: int = 0
    """Programs a multiprocessor that walk over all rows; 0: a program for every `rows` rows."""
    together: int = 0
    """Programs that share a multiprocessor's 65,536 registers; 0: whatever the compiler uses."""

    prefetch: int = 0
    """Blocks of rows beyond the next one that are asked into L2, where `resident`."""

    @property
    def registers(self) -> int | None:
        """Bound a thread."""
        programs = self.resident or self.together
        return min(255, 65_536 // (32 * self.warps * programs) // 8 * 8) if programs else None


SPACE = tuple(
    GemvConfig(rows, warps, *programs)
    for rows, warps, choices in (
        (4, 4, ((0,), (4,), (4, 0, 1))),
        (4, 8, ((0, 3), (2, 0, 1), (3, 0, 1))),
        (8, 2, ((0,), (8,))),
        (8, 4, ((0,), (4,), (4, 0, 1))),
        (8, 8, ((0, 2), (2,), (2, 0, 1))),
        (16, 2, ((0,),)),
        (16, 4, ((0,), (0, 4), (4,), (4, 0, 1))),
        (16, 8, ((0,), (0, 2), (2,), (2, 0, 1))),
        (32, 4, ((0,), (0, 2))),
        (32, 8, ((0,), (0, 2))),
    )
    for programs in choices
)
"""What tuning tries."""


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
def prefetch_block(
    weight_ptr, block, N, CHUNKS: tl.constexpr, LINES: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ask for the rows of a block; L2 stays coherent, so this needs no order."""
    ROW_WORDS: tl.constexpr = CHUNKS * (16 * PLANES if PLANES < 3 else 40)
    row = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
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
def load_field(x_ptr, K, FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Columns of field FIELD of every chunk of x as fp32 [WORDS, 4], zeros beyond K."""
    word = tl.arange(0, WORDS)[:, None]
    k = word // 16 * 256 + FIELD * 64 + word % 16 * 4 + tl.arange(0, 4)[None, :]
    return tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def pack_words(x, inverse):
    """x fp32 [WORDS, 4] -> its int8 q as words [1, WORDS]."""
    # Rounded, q is the low byte. A non-finite x leaves any byte: the row's scale is NaN.
    q = (x * inverse + ROUND_TO_EVEN).to(tl.int32, bitcast=True) & 255
    return tl.sum(q << (8 * tl.arange(0, 4))[None, :], axis=1)[None, :]


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
    weight_ptr, multiplier_ptr, block, N, groups,
    CHUNKS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    GROUPS: tl.constexpr, HALVES_A_GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Words and multipliers of a block of rows; rows beyond the end repeat the last one."""
    row = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    words = load_words(weight_ptr, row, CHUNKS, WORDS, PLANES)
    halves = (row, row)
    if GROUPS == HALVES:
        halves = load_multipliers(multiplier_ptr, row, groups, WORDS, HALVES_A_GROUP)
    return words, halves


@triton.jit
def gemv(
    x_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINES: tl.constexpr,
    STABLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """A program takes blocks of BLOCK_N rows; the next one is loaded before this one is used."""
    block = tl.program_id(0)
    step = tl.num_programs(0) if PERSISTENT else 1
    if DEPENDENT and not STABLE:
        gdc_wait()
    words, halves = load_block(
        weight_ptr, multiplier_ptr, block, N, groups, CHUNKS, WORDS, PLANES, GROUPS,
        HALVES_A_GROUP, BLOCK_N,
    )  # fmt: skip
    for ahead in tl.static_range(1, PREFETCH + 1):
        prefetch_block(weight_ptr, block + ahead * step, N, CHUNKS, LINES, PLANES, BLOCK_N)
    if DEPENDENT:
        if STABLE:
            gdc_wait()
        gdc_launch_dependents()

    x0 = load_field(x_ptr, K, 0, WORDS)
    x1 = load_field(x_ptr, K, 1, WORDS)
    x2 = load_field(x_ptr, K, 2, WORDS)
    x3 = load_field(x_ptr, K, 3, WORDS)
    largest = tl.maximum(
        tl.maximum(magnitude_bits(x0), magnitude_bits(x1)),
        tl.maximum(magnitude_bits(x2), magnitude_bits(x3)),
    )
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    inverse, sx = row_scale(largest.to(tl.float32, bitcast=True), 127.0)
    q = (
        pack_words(x0, inverse),
        pack_words(x1, inverse),
        pack_words(x2, inverse),
        pack_words(x3, inverse),
    )

    blocks = tl.cdiv(N, BLOCK_N) if PERSISTENT else block + 1
    for current in range(block, blocks, step):
        now, halves_now = words, halves
        if PERSISTENT:
            words, halves = load_block(
                weight_ptr, multiplier_ptr, current + step, N, groups, CHUNKS, WORDS,
                PLANES, GROUPS, HALVES_A_GROUP, BLOCK_N,
            )  # fmt: skip
        if PREFETCH > 0:
            later = current + (PREFETCH + 1) * step
            prefetch_block(weight_ptr, later, N, CHUNKS, LINES, PLANES, BLOCK_N)
        n = current * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1)
        total = row_sums(
            now, q, halves_now, row, multiplier_ptr, groups, group_size, PLANES, GROUPS,
            WORDS, ASM,
        )  # fmt: skip
        y = total.to(tl.float32) * sx
        y = y * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))
        if BIAS:
            y = y + tl.load(bias_ptr + row).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def linear_gemv(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, config: GemvConfig
) -> torch.Tensor:
    """x [1, K], contiguous, 8-bit activations -> y [1, N] in x.dtype: one launch."""
    y = torch.empty((1, weight.rows), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(weight.rows, config.rows)
    programs = config.resident * launch.processors(x.device.index or 0)
    persistent = 0 < programs < blocks
    dependent = launch.dependent_launch(x.device)
    gemv[(programs if persistent else blocks,)](
        x,
        weight.bytes.view(torch.int32),
        weight.scale,
        weight.multiplier_or(weight.scale),
        x if bias is None else bias,
        y,
        weight.rows,
        weight.columns,
        weight.groups,
        weight.group_size,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=weight.row_scales,
        BIAS=bias is not None,
        CHUNKS=weight.chunks,
        WORDS=16 * launch.power_of_two(weight.chunks),
        BLOCK_N=config.rows,
        PERSISTENT=persistent,
        PREFETCH=config.prefetch if persistent and launch.INLINE_ASM else 0,
        LINES=launch.power_of_two(-(-weight.row_bytes // 128)),
        STABLE=dependent and weight.stable,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=config.warps,
        maxnreg=config.registers,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return y
