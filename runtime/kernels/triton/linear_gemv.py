"""y[n] = (sum_k q[k] W[n, k]) * sx * s[n] + b[n] for one row of x: one kernel, no tensor cores.

Every program loads its weights first, then normalises x, where a norm comes before, and quantises
all of it (absmax, int8) while they arrive, or loads it where it comes as integers, then multiplies
words of four codes with dp4a. Nothing is shared between programs. Of two weights, gate and up, it
may take the same rows and write act(gate) * up.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.fused_rows import activated
from ternc.runtime.kernels.triton.product import Product, rounded_sum, segment_of
from ternc.runtime.kernels.triton.rotate import rounded
from ternc.runtime.kernels.triton.token_input import (
    load_fields,
    load_integers,
    normalise,
    quantize_fields,
)
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


@dataclasses.dataclass(frozen=True)
class Norm:
    """What x goes through before it is quantised, as `ternc::norm_quantize` defines it."""

    kind: str
    eps: float
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    offset: float = 0.0
    round_first: bool = False


@triton.jit
def load_members(
    weight_ptrs, multiplier_ptrs, rows, block, groups,
    CHUNKS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Words and multipliers of a block of rows; with GATED of those rows of both weights."""
    if GATED:
        gate = load_block(
            (weight_ptrs[0],), (multiplier_ptrs[0],), (rows[0],), block, groups, CHUNKS, WORDS,
            PLANES, GROUPS, HALVES_A_GROUP, BLOCK_N,
        )  # fmt: skip
        up = load_block(
            (weight_ptrs[1],), (multiplier_ptrs[1],), (rows[1],), block, groups, CHUNKS, WORDS,
            PLANES, GROUPS, HALVES_A_GROUP, BLOCK_N,
        )  # fmt: skip
        members = (gate, up)
    else:
        members = (
            load_block(
                weight_ptrs, multiplier_ptrs, rows, block, groups, CHUNKS, WORDS, PLANES, GROUPS,
                HALVES_A_GROUP, BLOCK_N,
            ),
        )  # fmt: skip
    return members


@triton.jit
def multiply_rows(
    member, q, sx, row, multiplier_ptr, scale_ptr, bias_ptr, groups, group_size,
    PLANES: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows of one weight times q -> y fp32 [n]."""
    total = row_sums(
        member[0], q, member[1], row, multiplier_ptr, groups, group_size, PLANES, GROUPS, WORDS,
        ASM,
    )  # fmt: skip
    y = total.to(tl.float32) * sx
    y = y * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))
    if BIAS:
        y = y + tl.load(bias_ptr + row).to(tl.float32)
    return y


@triton.jit
def gemv(
    x_ptr,
    sx_ptr,
    gain_ptr,
    shift_ptr,
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
    eps,
    offset,
    INTEGERS: tl.constexpr,
    NORM: tl.constexpr,
    GAIN: tl.constexpr,
    SHIFT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
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

    x: floating point, or with INTEGERS words of four int8, and their scale at sx_ptr. GATED: the
    activation of act(W_0 x) * (W_1 x), which is all that is written then; else empty. ACTIVATION:
    the activation of the one product; else empty.
    """
    block = tl.program_id(0)
    step = tl.num_programs(0) if PERSISTENT else 1
    if DEPENDENT and not STABLE:
        gdc_wait()
    members = load_members(
        weight_ptrs, multiplier_ptrs, rows, block, groups, CHUNKS, WORDS, PLANES, GROUPS,
        HALVES_A_GROUP, BLOCK_N, GATED != "",
    )  # fmt: skip
    for ahead in tl.static_range(1, PREFETCH + 1):
        prefetch_block(weight_ptrs, rows, block + ahead * step, CHUNKS, LINES, PLANES, BLOCK_N)
    if DEPENDENT:
        if STABLE:
            gdc_wait()
        gdc_launch_dependents()

    if INTEGERS:
        sx = tl.load(sx_ptr)
        q = load_integers(x_ptr, K, WORDS)
    else:
        x = load_fields(x_ptr, K, WORDS)
        if NORM != "":
            x = normalise(
                x, gain_ptr, shift_ptr, K, eps, offset, x_ptr.dtype.element_ty, NORM, GAIN, SHIFT,
                ROUND_FIRST, WORDS, ASM,
            )  # fmt: skip
        q, sx = quantize_fields(x)

    for current in range(block, blocks if PERSISTENT else block + 1, step):
        now = members
        if PERSISTENT:
            members = load_members(
                weight_ptrs, multiplier_ptrs, rows, current + step, groups, CHUNKS, WORDS,
                PLANES, GROUPS, HALVES_A_GROUP, BLOCK_N, GATED != "",
            )  # fmt: skip
        if PREFETCH > 0:
            later = current + (PREFETCH + 1) * step
            prefetch_block(weight_ptrs, rows, later, CHUNKS, LINES, PLANES, BLOCK_N)
        if GATED != "":
            n, row, N = rows_of_block((rows[0],), current, BLOCK_N)
            y_ptr = y_ptrs[0]
            dtype: tl.constexpr = y_ptr.dtype.element_ty
            gate = multiply_rows(
                now[0], q, sx, row, multiplier_ptrs[0], scale_ptrs[0], bias_ptrs[0], groups,
                group_size, PLANES, GROUPS, WORDS, ROW_SCALES, BIAS, ASM,
            )  # fmt: skip
            up = multiply_rows(
                now[1], q, sx, row, multiplier_ptrs[1], scale_ptrs[1], bias_ptrs[1], groups,
                group_size, PLANES, GROUPS, WORDS, ROW_SCALES, BIAS, ASM,
            )  # fmt: skip
            y = activated(rounded(gate, dtype, ASM), GATED, ASM)
            y = rounded(y, dtype, ASM) * rounded(up, dtype, ASM)
        else:
            n, row, N = rows_of_block(rows, current, BLOCK_N)
            y = multiply_rows(
                now[0], q, sx, row, segment_of(multiplier_ptrs, rows, current, BLOCK_N),
                segment_of(scale_ptrs, rows, current, BLOCK_N),
                segment_of(bias_ptrs, rows, current, BLOCK_N), groups, group_size, PLANES, GROUPS,
                WORDS, ROW_SCALES, BIAS, ASM,
            )  # fmt: skip
            y_ptr = segment_of(y_ptrs, rows, current, BLOCK_N)
            if ACTIVATION != "":
                y = activated(rounded(y, y_ptr.dtype.element_ty, ASM), ACTIVATION, ASM)
            if RESIDUAL:
                y = rounded_sum(y, tl.load(residual_ptr + row))
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def linear_gemv(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    product: Product,
    config: GemvConfig,
    norm: Norm | None = None,
    gated: str = "",
    activation: str = "",
) -> None:
    """x [1, K], contiguous, 8-bit activations -> product.outputs: one launch.

    x is floating point and is normalised, with `norm`, and quantised here; or int8 of scale sx, K a
    multiple of 4. `gated`: act(W_0 x) * (W_1 x) of two weights with as many rows -> outputs[0].
    `activation`: act(W_0 x) of one weight.
    """
    weight = product.joint
    block_rows = config.rows // 2 if gated else config.rows
    blocks = -(-product.weights[0].rows // block_rows) if gated else product.blocks(block_rows)
    programs = config.resident * launch.processors(x.device.index or 0)
    persistent = 0 < programs < blocks
    dependent = launch.dependent_launch(x.device)
    norm = norm or Norm("", 0.0)
    gemv[(programs if persistent else blocks,)](
        x_ptr=x if sx is None else x.view(torch.int32),
        sx_ptr=x if sx is None else sx,
        gain_ptr=x if norm.gain is None else norm.gain,
        shift_ptr=x if norm.bias is None else norm.bias,
        **product.pointers(torch.int32),
        blocks=blocks,
        K=x.shape[1],
        groups=weight.groups,
        group_size=weight.group_size,
        eps=norm.eps,
        offset=norm.offset,
        INTEGERS=sx is not None,
        NORM=norm.kind,
        GAIN=norm.gain is not None,
        SHIFT=norm.bias is not None,
        ROUND_FIRST=norm.round_first,
        GATED=gated,
        ACTIVATION=activation,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=product.weights[0].row_scales,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        CHUNKS=weight.chunks,
        WORDS=16 * launch.power_of_two(weight.chunks),
        BLOCK_N=block_rows,
        PERSISTENT=persistent,
        PREFETCH=config.prefetch if persistent and launch.INLINE_ASM and not gated else 0,
        LINES=launch.power_of_two(-(-weight.row_bytes // 128)),
        STABLE=dependent and product.stable,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=config.warps,
        maxnreg=config.registers,
        launch_pdl=dependent,
        **launch.EXACT,
    )
