"""grouped_linear(x, offsets, W): rows of x, sorted by expert, times the weight of their expert.

y[m, n] = (sum_k q[m, k] W[e, n, k]) * sx[m] * s[e, n], as out^T = W q^T, one launch. Programs find
their expert from the offsets on the device: nothing waits for the host, a recorded graph follows
the router. Tiles are those of linear_gemm.py, without a split of K.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.formats.p256 import CHUNK
from ternc.runtime import dispatch
from ternc.runtime.kernels.triton import launch, linear_int8, quantize_act, select
from ternc.runtime.kernels.triton.decode import SHIFTS, load_chunk
from ternc.runtime.kernels.triton.expert_tiles import share_of
from ternc.runtime.kernels.triton.linear import aligned
from ternc.runtime.kernels.triton.linear_grouped_any import gemm_any
from ternc.runtime.kernels.triton.linear_tile import load_scales, write_tile
from ternc.runtime.kernels.triton.weight import Weight
from ternc.runtime.ops import grouped_linear as grouped_op


@dataclasses.dataclass(frozen=True)
class GroupedConfig:
    """Tile of the output of one expert."""

    rows: int
    tokens: int
    warps: int
    stages: int


def choose(tokens: int, experts: int, grouped: bool) -> GroupedConfig:
    """By the rows that an expert has on average, and whether groups of columns have multipliers."""
    each = -(-tokens // experts)
    if each <= 32:
        return GroupedConfig(64, max(16, launch.power_of_two(each)), 4, 4)
    return GroupedConfig(128, 128 if grouped and each > 256 else 64, 8, 3)


@triton.jit(do_not_specialize=["M", "chunks", "groups", "group_size", "tiles_n"])
def gemm_grouped(
    q_ptr,
    sx_ptr,
    offsets_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    y_ptr,
    M,
    N,
    padded,
    columns,
    chunks,
    groups,
    group_size,
    tiles_n,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    GIVEN: tl.constexpr,
    TAIL: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program a tile [BLOCK_N, BLOCK_M] of out^T of one expert; `padded` weight rows each."""
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    if DEPENDENT:
        gdc_wait()
    tile, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    expert, begin, end = share_of(offsets_ptr, tile, M, E, GIVEN, SLOTS, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = begin + tl.arange(0, BLOCK_M)
    token = tl.maximum(tl.minimum(m, end - 1), 0)
    k = tl.arange(0, 256)
    first = tl.minimum(expert, E - 1).to(tl.int64) * padded
    row = first + tl.minimum(n, N - 1)
    weight_row = weight_ptr + (row * (chunks * CHUNK_BYTES))[:, None]
    multiplier_row = multiplier_ptr + (row * groups)[:, None]
    q_tile = q_ptr + (token.to(tl.int64) * columns)[None, :] + k[:, None]
    steps = tl.where((expert < E) & (begin < end), chunks, 0)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for i in range(steps):
        if TAIL:
            q = tl.load(q_tile + i * 256, mask=(i * 256 + k)[:, None] < columns, other=0)
        else:
            q = tl.load(q_tile + i * 256)
        w = load_chunk(
            weight_row, multiplier_row, i, groups, group_size, PLANES, GROUPS, HALVES_A_GROUP, ASM
        )
        total = tl.dot(w, q, acc=total, out_dtype=tl.int32)
    if DEPENDENT:
        gdc_launch_dependents()
    if expert < E:
        own_scale = scale_ptr + first if ROW_SCALES else scale_ptr
        scale = load_scales(own_scale, n, N, ROW_SCALES)
        write_tile(
            total, n, m, N, end, N, tl.load(sx_ptr + token), scale, own_scale, y_ptr, y_ptr,
            SHIFTS[PLANES], GROUPS, False, False,
        )  # fmt: skip
    else:
        place = (m.to(tl.int64) * N)[None, :] + n[:, None]
        nothing = tl.zeros([BLOCK_N, BLOCK_M], y_ptr.dtype.element_ty)
        tl.store(y_ptr + place, nothing, mask=(n < N)[:, None] & (m < end)[None, :])


def grouped_linear(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    experts: int,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [..., K] -> [..., N]: the signature of the op; what has no kernel goes expert by expert."""
    numbers = (experts, out_features, group_size, activation_bits, layout, dtype)
    grouped_op.check_grouped_linear(x, sx, offsets, weight, scale, multiplier, *numbers)
    columns, padded = x.shape[-1], grouped_op.padded_rows(out_features)
    packed = Weight.of(weight, scale, multiplier, experts * padded, columns, group_size, layout)
    if select.unsupported(packed) or not (columns and experts):
        return grouped_op.grouped_linear(x, sx, offsets, weight, scale, multiplier, *numbers)
    y = x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    if not y.numel():
        return y
    rows, outputs = x.flatten(0, -2).contiguous(), y.view(-1, out_features)
    if not activation_bits:
        dispatch.record(weight, "triton_grouped_any")
        gemm_any(rows, None, offsets, packed, experts, padded, outputs)
        return y
    integers = _integers(rows, sx, packed, activation_bits)
    other = packed.free_scales or layout == linear_int8.LAYOUT
    dispatch.record(weight, "triton_grouped_any" if other else "triton_grouped")
    multiply = gemm_any if other else _multiply
    multiply(*integers, offsets, packed, experts, padded, outputs)
    return y


def _integers(
    x: torch.Tensor, sx: torch.Tensor | None, weight: Weight, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], floating point or integers -> q [M, >= K], sx [M]."""
    if sx is not None:
        return aligned(x), sx.reshape(-1).contiguous()
    q = torch.empty((x.shape[0], weight.chunks * CHUNK), dtype=torch.int8, device=x.device)
    steps = torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)
    quantize_act.launch_rows(x, q, steps, bits)
    return q, steps


def _multiply(
    q: torch.Tensor,
    sx: torch.Tensor,
    offsets: torch.Tensor | None,
    weight: Weight,
    experts: int,
    padded: int,
    y: torch.Tensor,
) -> None:
    """q int8 [M, >= K] -> y [M, N], one launch."""
    tokens, rows = y.shape
    config = choose(tokens, experts, weight.multiplier is not None)
    # Every tile has a row; every expert, and the rows that have none, ends one early at most.
    tiles = min(tokens, triton.cdiv(tokens, config.tokens) + experts)
    tiles_n = triton.cdiv(rows, config.rows)
    dependent = launch.dependent_launch(q.device)
    gemm_grouped[(tiles * tiles_n,)](
        q,
        sx,
        sx if offsets is None else offsets.contiguous(),
        weight.bytes,
        weight.scale,
        weight.multiplier_or(weight.scale),
        y,
        tokens,
        rows,
        padded,
        q.shape[1],
        weight.chunks,
        weight.groups,
        weight.group_size,
        tiles_n,
        E=experts,
        SLOTS=launch.power_of_two(experts + 1),
        GIVEN=offsets is not None,
        TAIL=q.shape[1] % CHUNK != 0,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=weight.row_scales,
        BLOCK_N=config.rows,
        BLOCK_M=config.tokens,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=dependent,
        **launch.EXACT,
    )
