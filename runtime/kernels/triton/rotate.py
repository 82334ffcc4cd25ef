"""x blockdiag(H_b) / sqrt(b) on tensor cores, for tiles of 64 columns; and `hadamard`, the op.

A run of b = 64 L columns is a tile [L, 64]; H_b is the Kronecker product of H_L and H_64, so the
tile becomes H_L x H_64. The first product of a 16-bit x is exact in its sums' fp32; before the
second one they are cut in two bf16 parts, which leaves a relative error near 2**-17.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.ops import hadamard as hadamard_op

COLUMNS = 64
"""Columns of a tile."""
MOST_ROWS = 64
LEAST_ROWS = 16
"""Rows of a tile that is multiplied with H_L."""


PART: tl.constexpr = tl.constexpr(tl.float32 if launch.INTERPRETED else tl.bfloat16)
"""What sums of 16-bit values are cut into; Triton's interpreter multiplies no bf16."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a row of K columns is cut: `count` tiles [rows, 64], zeros beyond K."""

    rows: int
    count: int
    block: int
    """Of the Hadamard transform; 0: none, and a tile may have any number of rows."""

    @classmethod
    def of(cls, columns: int, block: int) -> Tiling:
        rows = launch.power_of_two(-(-columns // COLUMNS))
        if not block:
            return cls(rows, 1, 0)
        rows = max(LEAST_ROWS, min(MOST_ROWS, rows))
        return cls(rows, -(-columns // (rows * COLUMNS)), block)


@triton.jit
def factor(SIZE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """blockdiag(H_BLOCK) [SIZE, SIZE]; H is -1 where the bits of i & j are odd in number."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    odd = i & j & (BLOCK - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    value = 1.0 - 2.0 * (odd & 1).to(tl.float32)
    if BLOCK < SIZE:
        value = tl.where((i ^ j) < BLOCK, value, 0.0)
    return value.to(dtype)


@triton.jit
def factors(dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(left [ROWS, ROWS], right [64, 64]) of `rotate`; left is not used where BLOCK <= 64."""
    if BLOCK > 64:
        left = factor(ROWS, BLOCK // 64, dtype)
        right = factor(64, 64, tl.float32 if dtype == tl.float32 else PART)
    else:
        right = factor(64, BLOCK, dtype)
        left = right
    return left, right


@triton.jit
def with_signs(x, signs):
    """x times signs int8 of +1 and -1, by their sign bits."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) ^ ((signs.to(tl.int32) >> 7) << 31)
    else:
        bits = x.to(tl.int16, bitcast=True) ^ ((signs.to(tl.int16) >> 7) << 15)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """fp32 -> fp32, rounded to the values of a dtype."""
    if dtype == tl.bfloat16 and ASM:
        # Two at a time: single conversions run at a quarter of the speed.
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16;"
            " and.b32 $1, t, 0xFFFF0000; }",
            "=&r,=r,r,r",
            [x.to(tl.int32, bitcast=True)],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        x = bits.to(tl.float32, bitcast=True)
    elif dtype != tl.float32:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def rotate(x, left, right, BLOCK: tl.constexpr):
    """Tile [ROWS, 64] -> fp32, every run of BLOCK columns times H / sqrt(BLOCK)."""
    if x.dtype == tl.float32:
        z = x
        if BLOCK > 64:
            z = tl.dot(left, z, input_precision="tf32x3")
        z = tl.dot(z, right, input_precision="tf32x3")
    elif BLOCK > 64:
        sums = tl.dot(left, x)
        high = rounded(sums, PART, True)
        low = (sums - high).to(PART)
        z = tl.dot(low, right, acc=tl.dot(high.to(PART), right))
    else:
        z = tl.dot(x, right)
    return z * (BLOCK**-0.5)


@triton.jit
def hadamard_tiles(
    x_ptr,
    signs_ptr,
    z_ptr,
    total,
    K,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Programs walk over tiles of 4096 of all `total` elements; blocks lie within tiles."""
    left, right = factors(x_ptr.dtype.element_ty, 64, BLOCK)
    inside = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    if DEPENDENT:
        gdc_wait()
    first = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first, tl.cdiv(total, 4096), tl.num_programs(0)):
        place = tile * 4096 + inside
        x = tl.load(x_ptr + place, mask=place < total, other=0.0)
        if SIGNS:
            signs = tl.load(signs_ptr + place % K, mask=place < total, other=1)
            x = with_signs(x, signs)
        z = rotate(x, left, right, BLOCK)
        tl.store(z_ptr + place, z.to(z_ptr.dtype.element_ty), mask=place < total)
    if DEPENDENT:
        gdc_launch_dependents()


RESIDENT = 5
"""Programs a multiprocessor."""


def hadamard(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> torch.Tensor:
    """(x * signs) blockdiag(H_b) / sqrt(b): the signature of the op."""
    hadamard_op.check_hadamard(x, signs, block)
    rows = x.contiguous()
    z = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if not z.numel():
        return z
    dependent = launch.dependent_launch(x.device)
    tiles = triton.cdiv(z.numel(), 4096)
    programs = RESIDENT * launch.processors(x.device.index or 0)
    hadamard_tiles[(min(tiles, programs),)](
        rows,
        rows if signs is None else signs.contiguous(),
        z,
        z.numel(),
        x.shape[-1],
        SIGNS=signs is not None,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=4,
        num_stages=3,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return z
