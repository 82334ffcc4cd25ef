"""y[n] = (sum_k q[k] W[n, k]) * sx * s[n] + b[n] for one row of x: one kernel, no tensor cores.

Every program loads its weights first, then quantises all of x (absmax, int8) while they arrive,
or loads it where it comes as integers, then multiplies words of four codes with dp4a. Nothing is
shared between programs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.product import Product, rounded_sum, segment_of
from ternc.runtime.kernels.triton.quantize_act import ROUND_TO_EVEN, magnitude_bits, row_scale
from ternc.runtime.kernels.triton.words import load_block, prefetch_block, row_sums, rows_of_block

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
def load_q(q_ptr, K, FIELD: tl.constexpr, WORDS: tl.constexpr):
    """Field FIELD of every chunk of q, given as words of four int8 -> [1, WORDS]."""
    # Loaded with one axis: with two, the compiler would give the weights this load's layout.
    word = tl.arange(0, WORDS)
    place = word // 16 * 64 + FIELD * 16 + word % 16
    return tl.load(q_ptr + place, mask=place < K // 4, other=0)[None, :]


@triton.jit
def quantize_words(x_ptr, K, WORDS: tl.constexpr):
    """x -> (four fields of its int8 q as words [1, WORDS], sx)."""
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
    return q, sx


@triton.jit
def gemv(
    x_ptr,
    sx_ptr,
    weight_ptrs,
    scale_ptrs,
    multiplier_ptrs,
    bias_ptrs,
    y_ptrs,
    residual_ptr,
    rows,
    blocks,
    K,
    groups,
    group_size,
    INTEGERS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
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
    """A program takes blocks of BLOCK_N rows; the next one is loaded before this one is used.

    x: floating point, or with INTEGERS words of four int8, and their scale at sx_ptr.
    """
    block = tl.program_id(0)
    step = tl.num_programs(0) if PERSISTENT else 1
    if DEPENDENT and not STABLE:
        gdc_wait()
    words, halves = load_block(
        weight_ptrs, multiplier_ptrs, rows, block, groups, CHUNKS, WORDS, PLANES, GROUPS,
        HALVES_A_GROUP, BLOCK_N,
    )  # fmt: skip
    for ahead in tl.static_range(1, PREFETCH + 1):
        prefetch_block(weight_ptrs, rows, block + ahead * step, CHUNKS, LINES, PLANES, BLOCK_N)
    if DEPENDENT:
        if STABLE:
            gdc_wait()
        gdc_launch_dependents()

    if INTEGERS:
        sx = tl.load(sx_ptr)
        q = (
            load_q(x_ptr, K, 0, WORDS),
            load_q(x_ptr, K, 1, WORDS),
            load_q(x_ptr, K, 2, WORDS),
            load_q(x_ptr, K, 3, WORDS),
        )
    else:
        q, sx = quantize_words(x_ptr, K, WORDS)

    for current in range(block, blocks if PERSISTENT else block + 1, step):
        now, halves_now = words, halves
        if PERSISTENT:
            words, halves = load_block(
                weight_ptrs, multiplier_ptrs, rows, current + step, groups, CHUNKS, WORDS,
                PLANES, GROUPS, HALVES_A_GROUP, BLOCK_N,
            )  # fmt: skip
        if PREFETCH > 0:
            later = current + (PREFETCH + 1) * step
            prefetch_block(weight_ptrs, rows, later, CHUNKS, LINES, PLANES, BLOCK_N)
        n, row, N = rows_of_block(rows, current, BLOCK_N)
        multiplier_ptr = segment_of(multiplier_ptrs, rows, current, BLOCK_N)
        total = row_sums(
            now, q, halves_now, row, multiplier_ptr, groups, group_size, PLANES, GROUPS,
            WORDS, ASM,
        )  # fmt: skip
        scale_ptr = segment_of(scale_ptrs, rows, current, BLOCK_N)
        y = total.to(tl.float32) * sx
        y = y * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))
        if BIAS:
            bias_ptr = segment_of(bias_ptrs, rows, current, BLOCK_N)
            y = y + tl.load(bias_ptr + row).to(tl.float32)
        if RESIDUAL:
            y = rounded_sum(y, tl.load(residual_ptr + row))
        y_ptr = segment_of(y_ptrs, rows, current, BLOCK_N)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def linear_gemv(
    x: torch.Tensor, sx: torch.Tensor | None, product: Product, config: GemvConfig
) -> None:
    """x [1, K], contiguous, 8-bit activations -> product.outputs: one launch.

    x is floating point and is quantised here; or int8 of scale sx, K a multiple of 4.
    """
    weight = product.joint
    blocks = product.blocks(config.rows)
    programs = config.resident * launch.processors(x.device.index or 0)
    persistent = 0 < programs < blocks
    dependent = launch.dependent_launch(x.device)
    gemv[(programs if persistent else blocks,)](
        x_ptr=x if sx is None else x.view(torch.int32),
        sx_ptr=x if sx is None else sx,
        **product.pointers(torch.int32),
        blocks=blocks,
        K=x.shape[1],
        groups=weight.groups,
        group_size=weight.group_size,
        INTEGERS=sx is not None,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=product.weights[0].row_scales,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        CHUNKS=weight.chunks,
        WORDS=16 * launch.power_of_two(weight.chunks),
        BLOCK_N=config.rows,
        PERSISTENT=persistent,
        PREFETCH=config.prefetch if persistent and launch.INLINE_ASM else 0,
        LINES=launch.power_of_two(-(-weight.row_bytes // 128)),
        STABLE=dependent and product.stable,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=config.warps,
        maxnreg=config.registers,
        launch_pdl=dependent,
        **launch.EXACT,
    )
