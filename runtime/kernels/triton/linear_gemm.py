"""y[m, n] = (sum_k q[m, k] W[n, k]) * sx[m] * s[n] + b[n] for M >= 2, as out^T = W q^T.

The weights are the left operand, decoded from registers to registers: they never pass through
shared memory as int8. K may be split over programs: the last one to finish a tile, or a kernel
behind, adds the int32 partial sums, which is exact in any order.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ternc.formats.p256 import CHUNK
from ternc.runtime.kernels.triton import launch, quantize_act
from ternc.runtime.kernels.triton.decode import (
    HALVES,
    SHIFTS,
    beside,
    half_multipliers,
    keep,
    load_chunk,
    load_halves,
    prefetch_lines,
)
from ternc.runtime.kernels.triton.gemm_config import GemmConfig
from ternc.runtime.kernels.triton.linear_tile import combine, load_scales, position, write_tile
from ternc.runtime.kernels.triton.product import Product, segment_of, segment_start

FEW_TOKENS = 512
"""Beyond, the next kernel's many waiting programs would take the room of this one's last tiles:
it is not let in early (0.8x the time at M = 2048, 1517 -> 2532)."""


COMBINED_ROWS = 16
"""Weight rows of a program that adds the parts of tiles."""
COMBINED = ("scale_ptrs", "bias_ptrs", "y_ptrs", "residual_ptr", "rows")


@triton.jit
def load_q(q_tile, first, k, columns, TAIL: tl.constexpr):
    """q int8 [k, m] from column `first` on, q_tile [k, m] pointing at the first ones; beyond the
    last column zeros, with TAIL.
    """
    if TAIL:
        q = tl.load(q_tile + first, mask=(first + k)[:, None] < columns, other=0)
    else:
        q = tl.load(q_tile + first)
    return q


@triton.jit
def add_halves(
    part, q_ptr, q_tile, first_m, k, weight_row, multiplier_row, chunk, chunks, columns, groups,
    TAIL: tl.constexpr, PLANES: tl.constexpr, HALVES_A_GROUP: tl.constexpr,
    TENSOR_MAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """part + 2**SHIFT times the products of a chunk: sums of halves times their multipliers.

    A half adds less than 2**27, so that a few chunks fit before they are shifted.
    """
    if TENSOR_MAP:
        q0 = tl.trans(q_ptr.load([first_m, chunk * 256]))
        q1 = tl.trans(q_ptr.load([first_m, chunk * 256 + 128]))
    else:
        q0 = load_q(q_tile, chunk * 256, k, columns, TAIL)
        q1 = load_q(q_tile, chunk * 256 + 128, k, columns, TAIL)
    # The chunk behind the last one is any chunk: its q are zeros.
    held = tl.minimum(chunk, chunks - 1)
    w0, w1 = load_halves(weight_row, held, PLANES, ASM)
    m0, m1 = half_multipliers(multiplier_row, held, groups, HALVES_A_GROUP)
    part += tl.dot(w0, q0, out_dtype=tl.int32) * m0
    part += tl.dot(w1, q1, out_dtype=tl.int32) * m1
    return part


@triton.jit(do_not_specialize=["M", "tiles_n", "unsplit", "chunks", "groups", "group_size"])
def gemm(
    q_ptr,
    sx_ptr,
    weight_ptrs,
    scale_ptrs,
    multiplier_ptrs,
    bias_ptrs,
    y_ptrs,
    residual_ptr,
    rows,
    partial_ptr,
    count_ptr,
    M,
    columns,
    tiles_n,
    unsplit,
    chunks,
    groups,
    group_size,
    TAIL: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    SUMS: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    COUNTED: tl.constexpr,
    FEW: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program a tile [BLOCK_N, BLOCK_M] of out^T and a part of K.

    q [M, columns]; with TAIL its last step is cut short, else it is padded with zeros. COUNTED: the
    last part of a tile to arrive adds all; else `combine` does.
    """
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    # Large tiles have no registers for them, and sums of groups then load their multipliers late.
    SCALES_AHEAD: tl.constexpr = BLOCK_N * BLOCK_M <= 2048 and not SUMS
    tile = tl.program_id(0)
    first_step, last_step = 0, tl.cdiv(chunks, STEP)
    share = (tile - unsplit) % SPLIT
    if SPLIT > 1:  # noqa: SIM102
        if tile >= unsplit:
            tile = unsplit + (tile - unsplit) // SPLIT
            first_step = last_step * share // SPLIT
            last_step = last_step * (share + 1) // SPLIT
    tile_n, tile_m = position(tile, tiles_n, tl.cdiv(M, BLOCK_M))

    # Rows beyond the end are others, and are not stored: loads need no mask. Of few tokens they
    # wrap around: repeating the last one, every program would read the same lines (1.4x the time
    # at M = 37). Of many they repeat it, which takes fewer registers (0.9x the time at M = 2048).
    N = segment_of(rows, rows, tile_n, BLOCK_N)
    n = (tile_n - segment_start(rows, tile_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1)
    token = tl.where(m < M, m, tl.minimum(m - M, M - 1)) if FEW else tl.minimum(m, M - 1)
    weight_ptr = segment_of(weight_ptrs, rows, tile_n, BLOCK_N)
    multiplier_ptr = segment_of(multiplier_ptrs, rows, tile_n, BLOCK_N)
    scale_ptr = segment_of(scale_ptrs, rows, tile_n, BLOCK_N)
    weight_row = weight_ptr + (row.to(tl.int64) * (chunks * CHUNK_BYTES))[:, None]
    multiplier_row = multiplier_ptr + (row.to(tl.int64) * groups)[:, None]
    k = tl.arange(0, 128 if SUMS else STEP * 256)
    if TENSOR_MAP:
        q_tile = tl.zeros([1], tl.int32)
    else:
        q_tile = q_ptr + (token.to(tl.int64) * columns)[None, :] + k[:, None]

    if DEPENDENT:
        if PREFETCH > 0:
            # The memory is idle while the kernel ahead quantises; L2 stays coherent.
            line = first_step * (STEP * CHUNK_BYTES) + tl.arange(0, PREFETCH)[None, :] * 128
            prefetch_lines(weight_row + tl.minimum(line, chunks * CHUNK_BYTES - 64))
            if GROUPS == HALVES:
                prefetch_lines(multiplier_row + tl.minimum(first_step * STEP, groups - 1))
        gdc_wait()
    if ASM and GROUPS == HALVES:
        # Multipliers are one or two bytes, which cannot be copied asynchronously: a sector of 32
        # is brought into L1 ahead of the loop, whose loads then wait tens of cycles, not hundreds.
        WORD: tl.constexpr = multiplier_row.dtype.element_ty.primitive_bitwidth // 8
        first = first_step * STEP * 2 // (HALVES_A_GROUP * WORD)
        sector = first + tl.arange(0, 4)[None, :] * (32 // WORD)
        warm = tl.load(multiplier_row + tl.minimum(sector, groups - 1)).to(tl.int8)
    if SCALES_AHEAD:
        sx, scale = tl.load(sx_ptr + token), load_scales(scale_ptr, n, N, ROW_SCALES)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for i in range(first_step, last_step):
        if SUMS:
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for ahead in tl.static_range(STEP):
                part = add_halves(
                    part, q_ptr, q_tile, tile_m * BLOCK_M, k, weight_row, multiplier_row,
                    i * STEP + ahead, chunks, columns, groups, TAIL, PLANES, HALVES_A_GROUP,
                    TENSOR_MAP, ASM,
                )  # fmt: skip
            total += part >> SHIFT
        else:
            if TENSOR_MAP:
                q = tl.trans(q_ptr.load([tile_m * BLOCK_M, i * (STEP * 256)]))
            else:
                q = load_q(q_tile, i * (STEP * 256), k, columns, TAIL)
            w = load_chunk(
                weight_row, multiplier_row, i * STEP, groups, group_size, PLANES, GROUPS,
                HALVES_A_GROUP, ASM,
            )  # fmt: skip
            if STEP == 2:
                # The chunk behind the last one is any chunk: its q are zeros.
                other = load_chunk(
                    weight_row, multiplier_row, tl.minimum(2 * i + 1, chunks - 1), groups,
                    group_size, PLANES, GROUPS, HALVES_A_GROUP, ASM,
                )  # fmt: skip
                w = beside(w, other)
            total = tl.dot(w, q, acc=total, out_dtype=tl.int32)
    if ASM and GROUPS == HALVES:
        keep(warm)
    if DEPENDENT and FEW:
        gdc_launch_dependents()

    end = tl.zeros([1], tl.int32) + N
    if SPLIT > 1:  # noqa: SIM102
        if tl.program_id(0) >= unsplit:
            place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            parts = partial_ptr + (tile - unsplit).to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
            tl.store(parts + share * (BLOCK_N * BLOCK_M) + place, total)
            AT_ONCE: tl.constexpr = min(SPLIT, max(1, 16384 // (BLOCK_N * BLOCK_M)))  # parts
            if COUNTED:
                tl.debug_barrier()
                arrived = tl.atomic_add(count_ptr + tile - unsplit, 1, sem="acq_rel")
                end = tl.where(arrived == SPLIT - 1, end, 0)  # only the last one stores
                if arrived == SPLIT - 1:
                    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
                    for other in tl.range(SPLIT, loop_unroll_factor=AT_ONCE):
                        partial = parts + other * (BLOCK_N * BLOCK_M) + place
                        total += tl.load(partial, cache_modifier=".cg")
            else:
                end = tl.zeros([1], tl.int32)  # `combine` stores
    if not SCALES_AHEAD:
        sx, scale = tl.load(sx_ptr + token), load_scales(scale_ptr, n, N, ROW_SCALES)
    write_tile(
        total, n, m, end, M, N, sx, scale, segment_of(bias_ptrs, rows, tile_n, BLOCK_N),
        segment_of(y_ptrs, rows, tile_n, BLOCK_N), residual_ptr, SHIFT, GROUPS, BIAS, RESIDUAL,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Integers:
    """q int8 [M, >= K] with scales sx [M], and counters for a split where they were zeroed."""

    q: torch.Tensor
    sx: torch.Tensor
    counts: torch.Tensor | None = None


def cut(product: Product, tokens: int, config: GemmConfig) -> tuple[int, int, int]:
    """(tiles, how many of them one program each computes, programs that share the others)."""
    tiles = product.blocks(config.rows) * triton.cdiv(tokens, config.tokens)
    device = product.outputs[0].device
    return tiles, *config.cut(tiles, launch.processors(device.index or 0))


def quantize(x: torch.Tensor, product: Product, bits: int, config: GemmConfig) -> Integers:
    """x [M, K], contiguous -> its integers, padded for the steps of `config`, zeroed counters."""
    tokens, device = x.shape[0], x.device
    padded = -(-product.weights[0].chunks // config.step) * config.step * CHUNK
    q = quantize_act.empty_rows((tokens, padded), device)
    sx = torch.empty((tokens,), dtype=torch.float32, device=device)
    tiles, unsplit, _ = cut(product, tokens, config)
    counts = None
    if unsplit < tiles:
        counts = torch.empty((tiles - unsplit,), dtype=torch.int32, device=device)
    quantize_act.launch_rows(x, q, sx, bits, counts)
    return Integers(q, sx, counts)


def tiles_of(q: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    """q [M, K] as the copy engine sees it: to the end of its last tile where its storage goes on.

    What lies behind the last token is read and multiplied, and never stored.
    """
    rows = -(-q.shape[0] // tile[0]) * tile[0]
    held = q.untyped_storage().nbytes() - q.storage_offset()
    if rows * q.shape[1] > held:
        rows = q.shape[0]
    return TensorDescriptor(q, [rows, q.shape[1]], [*q.stride()], tile)


def linear_gemm(integers: Integers, product: Product, config: GemmConfig) -> None:
    """integers -> product.outputs: one launch, nothing is zero-filled.

    A split without `integers.counts`, zeros, takes one launch more. Rows of q are aligned to 16
    bytes.
    """
    q, sx, counts = integers.q, integers.sx, integers.counts
    weight, tokens, device = product.joint, q.shape[0], q.device
    tiles, unsplit, split = cut(product, tokens, config)
    partial = None
    if unsplit < tiles:
        shape = (tiles - unsplit, split, config.rows, config.tokens)
        partial = torch.empty(shape, dtype=torch.int32, device=device)
    dependent = launch.dependent_launch(device)
    step = config.step * CHUNK
    sums = weight.groups_kind == HALVES.value and config.sums
    tensor_map = config.tensor_map and launch.tensor_maps(device)
    paired = product.paired
    pointers = product.pointers(torch.int8, paired)
    gemm[(unsplit + (tiles - unsplit) * split,)](
        q_ptr=tiles_of(q, [config.tokens, CHUNK // 2 if sums else step]) if tensor_map else q,
        sx_ptr=sx,
        **pointers,
        partial_ptr=sx if partial is None else partial,
        count_ptr=sx if counts is None else counts,
        M=tokens,
        columns=q.shape[1],
        tiles_n=product.blocks(config.rows),
        unsplit=unsplit,
        chunks=weight.chunks,
        groups=weight.groups // 2 if paired else weight.groups,
        group_size=weight.group_size,
        TAIL=q.shape[1] % step != 0,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=product.weights[0].row_scales,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        BLOCK_N=config.rows,
        BLOCK_M=config.tokens,
        SPLIT=split,
        STEP=config.step,
        SUMS=sums,
        TENSOR_MAP=tensor_map,
        PREFETCH=config.prefetch if launch.INLINE_ASM else 0,
        COUNTED=counts is not None,
        FEW=tokens <= FEW_TOKENS,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=config.registers,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    if unsplit < tiles and counts is None:
        combine[(tiles - unsplit, config.rows // COMBINED_ROWS)](
            sx_ptr=sx,
            **{name: value for name, value in pointers.items() if name in COMBINED},
            partial_ptr=partial,
            M=tokens,
            tiles_n=product.blocks(config.rows),
            unsplit=unsplit,
            SHIFT=SHIFTS.value[weight.planes],
            GROUPS=weight.groups_kind,
            ROW_SCALES=product.weights[0].row_scales,
            BIAS=product.biases is not None,
            RESIDUAL=product.residual is not None,
            BLOCK_N=config.rows,
            BLOCK_M=config.tokens,
            SPLIT=split,
            ROWS=COMBINED_ROWS,
            DEPENDENT=dependent,
            num_warps=4,
            launch_pdl=dependent,
            **launch.EXACT,
        )
