"""x blockdiag(H_b) / sqrt(b) on tensor cores, for tiles of 64 columns; and `hadamard`, the op.

A run of b = 64 L columns is a tile [L, 64]; H_b is the Kronecker product of H_L and H_64, so the
tile becomes H_L x H_64. The first product of a 16-bit x is exact in its sums' fp32; before the
second one they are cut in bf16 parts. Two leave a relative error near 2**-17, with which the
largest value of a row of 4096 rounds to another bf16 in 1 row of 8,000, and its q differ by a
tenth: nothing among many rows, too much of few. These (PRECISE_ROWS) are cut in three parts, which
leave what the sums in fp32 leave.
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


PRECISE_ROWS = 512
"""Up to here rows are cut in three parts."""

PART: tl.constexpr = tl.constexpr(tl.float32 if launch.INTERPRETED else tl.bfloat16)
"""What holds the parts; Triton's interpreter multiplies no bf16, there it is fp32 of its values."""


_EXPONENTS = {2**k: -(k // 2) for k in range(13)}
EXPONENTS: tl.constexpr = tl.constexpr(_EXPONENTS)
"""By block: of the power of two in 1 / sqrt(block), which `right` takes."""
REST: tl.constexpr = tl.constexpr({b: b**-0.5 / 2.0**e for b, e in _EXPONENTS.items()})
"""By block: what is left of it, 1 or 1 / sqrt(2)."""

EXPONENT_BITS: tl.constexpr = tl.constexpr({16: (127, 7), 32: (127, 23)})
"""By width of a bf16 or fp32: bias and place of the exponent."""
ODD: tl.constexpr = tl.constexpr(0x6996)
"""Bit x: whether the bits of x < 16 are odd in number."""


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
def entries(i, j, BLOCK: tl.constexpr, EXPONENT: tl.constexpr, dtype: tl.constexpr):
    """blockdiag(H_BLOCK) 2**EXPONENT at rows i, columns j: below 0 where i & j has odd parity."""
    both = i & j & (BLOCK - 1)
    odd = (ODD >> ((both ^ (both >> 4)) & 15)) & 1
    # Written as bits: conversions from integers would be most of a short kernel.
    exact: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    bias: tl.constexpr = EXPONENT_BITS[exact.primitive_bitwidth][0]
    place: tl.constexpr = EXPONENT_BITS[exact.primitive_bitwidth][1]
    word: tl.constexpr = tl.int16 if dtype == tl.bfloat16 else tl.int32
    sign = odd << (exact.primitive_bitwidth - 1)
    bits = tl.where((i ^ j) < BLOCK, sign | ((bias + EXPONENT) << place), 0)
    return bits.to(word).to(exact, bitcast=True).to(dtype)


@triton.jit
def factors(
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISE: tl.constexpr
):  # fmt: skip
    """(left [ROWS, ROWS], right [64 or 128, 64]) of `rotate`; left not used where BLOCK <= 64.

    The tensor cores leave columns 8 n + 2 t + e (t < 4, e < 2) with thread t of a row: `right`
    has its columns in such an order that these are the adjacent 16 t + 2 n + e. Of 64 rows warp w
    has 16 w + 8 h + g (h < 2, g < 8): those of `left` are in the order in which they are stored,
    32 h + 8 w + g.
    """
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    j = j % 8 // 2 * 16 + j // 8 * 2 + j % 2
    if BLOCK > 64:
        part: tl.constexpr = tl.float32 if dtype == tl.float32 else PART
        if dtype != tl.float32 and ROWS == 64 and not PRECISE:  # twice, for two parts
            i = tl.arange(0, 128)[:, None]
        right = entries(i % 64, j, 64, EXPONENTS[BLOCK], part)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        if ROWS == 64:
            row = row // 8 % 2 * 32 + row // 16 * 8 + row % 8
        left = entries(row, column, BLOCK // 64, 0, dtype)
    else:
        right = entries(i, j, BLOCK, EXPONENTS[BLOCK], dtype)
        left = right
    return left, right


@triton.jit
def with_signs(x, signs, ASM: tl.constexpr):
    """x with its signs flipped where `signs`, int8 +1 and -1, are negative."""
    if x.dtype == tl.float32 or not ASM:
        word: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
        bits = (signs.to(word) >> 7) << (word.primitive_bitwidth - 1)
        values = x.to(word, bitcast=True) ^ bits
    else:
        # Four at a time: every sign in the upper byte of a half word.
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $4, $4, 0x1000; prmt.b32 b, $4, $4, 0x3020;"
            " lop3.b32 $0, $2, a, 0x80008000, 0x78; lop3.b32 $1, $3, b, 0x80008000, 0x78; }",
            "=&r,=r,r,r,r",
            [x.to(tl.int16, bitcast=True), signs],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        )
    return values.to(x.dtype, bitcast=True)


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
def narrowed(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """fp32 -> dtype; 16-bit values stay in pairs."""
    if ASM and dtype != tl.float32:
        # Single conversions run at a quarter of the speed.
        CONVERT: tl.constexpr = (
            "cvt.rn.bf16x2.f32 $0, $2, $1;"
            if dtype == tl.bfloat16
            else "cvt.rn.f16x2.f32 $0, $2, $1;"
        )
        pairs = tl.inline_asm_elementwise(
            CONVERT, "=r,f,f", [x], dtype=tl.int16, is_pure=True, pack=2
        )
        x = pairs.to(dtype, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def two_parts(x, ASM: tl.constexpr):
    """fp32 -> (high, low) whose sum is x but for 2**-17 of it."""
    if ASM:
        high, low = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; cvt.rn.bf16x2.f32 $0, $3, $2; shl.b32 a, $0, 16;"
            " and.b32 b, $0, 0xFFFF0000; sub.rn.f32 a, $2, a; sub.rn.f32 b, $3, b;"
            " cvt.rn.bf16x2.f32 $1, b, a; }",
            "=&r,=r,r,r",
            [x.to(tl.int32, bitcast=True)],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        high, low = high.to(tl.bfloat16, bitcast=True), low.to(tl.bfloat16, bitcast=True)
    else:
        high = x.to(tl.bfloat16).to(PART)
        low = (x - high.to(tl.float32)).to(tl.bfloat16).to(PART)
    return high, low


@triton.jit
def rotate(x, left, right, BLOCK: tl.constexpr, PRECISE: tl.constexpr, ASM: tl.constexpr):
    """Tile [ROWS, 64] -> fp32, every run of BLOCK columns times H / sqrt(BLOCK).

    PRECISE: 16-bit values in three parts, in place of two.
    """
    if x.dtype == tl.float32:
        z = x
        if BLOCK > 64:
            z = tl.dot(left, z, input_precision="tf32x3")
        z = tl.dot(z, right, input_precision="tf32x3")
    elif BLOCK > 64:
        y = tl.dot(left, x)
        high, low = two_parts(y, ASM)
        if PRECISE:
            rest = y - high.to(tl.float32) - low.to(tl.float32)
            lowest = narrowed(rest, tl.bfloat16, ASM).to(PART)
            z = tl.dot(high, right, acc=tl.dot(low, right, acc=tl.dot(lowest, right)))
        elif x.shape[0] == 64:
            # One product of both parts: warp groups wait for each.
            both = tl.permute(tl.join(high, low), (0, 2, 1))
            z = tl.dot(tl.reshape(both, [64, 128]), right)
        else:
            z = tl.dot(low, right, acc=tl.dot(high, right))
    else:
        z = tl.dot(x, right)
    if REST[BLOCK] != 1.0:
        z = z * REST[BLOCK]
    # Back to the order of `factors`: nothing leaves its thread.
    ROWS: tl.constexpr = x.shape[0]
    if ROWS == 64 and BLOCK > 64:
        z = tl.permute(tl.reshape(z, [4, 2, 8, 8, 4, 2]), (1, 0, 2, 4, 3, 5))
    else:
        z = tl.permute(tl.reshape(z, [ROWS, 8, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(z, [ROWS, 64])


@triton.jit
def not_finite(x):
    """Whether x, of 16 or 32 bits, is NaN or infinite."""
    word: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
    if x.dtype == tl.float32:
        INFINITY: tl.constexpr = 0x7F800000
    else:
        INFINITY: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
    ONES: tl.constexpr = 0x7FFFFFFF if x.dtype == tl.float32 else 0x7FFF
    return (x.to(word, bitcast=True) & ONES) >= INFINITY


@triton.jit
def whole_blocks(wrong, BLOCK: tl.constexpr):
    """int32 [64, 64] -> above 0 in every block with an entry above 0; [64, 1] if that says it."""
    if BLOCK < 64:
        LOCAL: tl.constexpr = 64 // BLOCK
        found = tl.max(tl.reshape(wrong, [64, LOCAL, BLOCK]), axis=2)
        found = tl.broadcast_to(found[:, :, None], [64, LOCAL, BLOCK])
        found = tl.reshape(found, [64, 64])
    else:
        found = tl.max(wrong, axis=1)
        if BLOCK > 64:
            LENGTH: tl.constexpr = BLOCK // 64
            found = tl.max(tl.reshape(found, [64 // LENGTH, LENGTH]), axis=1)
            found = tl.broadcast_to(found[:, None], [64 // LENGTH, LENGTH])
            found = tl.reshape(found, [64])
        found = found[:, None]
    return found


@triton.jit
def rotate_blocks(
    x, left, right, BLOCK: tl.constexpr, PRECISE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """`rotate` of a tile whose blocks are several rows': what is not finite stays in its block.

    The products alone would spread it over the tile: 0 times NaN is NaN.
    """
    wrong = not_finite(x)
    z = rotate(tl.where(wrong, 0.0, x).to(x.dtype), left, right, BLOCK, PRECISE, ASM)
    return tl.where(whole_blocks(wrong.to(tl.int32), BLOCK) > 0, float("nan"), z)


@triton.jit
def hadamard_tiles(
    x_ptr,
    signs_ptr,
    z_ptr,
    total,
    K,
    SIGNS: tl.constexpr,
    UNIT: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """Programs walk over tiles of 4096 of all `total` elements; blocks lie within tiles, SEVERAL:
    of several rows.
    """
    left, right = factors(x_ptr.dtype.element_ty, 64, BLOCK, PRECISE)
    inside = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    if DEPENDENT:
        gdc_wait()
    first = tl.program_id(0).to(tl.int64)
    # Column of a tile's first element, in units that divide it and K, and in 32 bits: a remainder
    # of 64 bits takes long.
    units = K // UNIT
    column = (first * (4096 // UNIT) % units).to(tl.int32)
    step = (tl.num_programs(0) * (4096 // UNIT) % units).to(tl.int32)
    for tile in tl.range(first, tl.cdiv(total, 4096), tl.num_programs(0)):
        place = tile * 4096 + inside
        x = tl.load(x_ptr + place, mask=place < total, other=0.0)
        if SIGNS:
            x = with_signs(x, tl.load(signs_ptr + (column * UNIT + inside) % K), ASM)
            column = (column + step) % units
        if SEVERAL:
            z = rotate_blocks(x, left, right, BLOCK, PRECISE, ASM)
        else:
            z = rotate(x, left, right, BLOCK, PRECISE, ASM)
        z = narrowed(z, z_ptr.dtype.element_ty, ASM)
        tl.store(z_ptr + place, z, mask=place < total)
    if DEPENDENT:
        gdc_launch_dependents()


RESIDENT, REGISTERS = 4, 128
"""Programs a multiprocessor, and what leaves room for so many."""


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
    precise = tiles <= PRECISE_ROWS
    hadamard_tiles[(min(tiles, programs),)](
        rows,
        rows if signs is None else signs.contiguous(),
        z,
        z.numel(),
        x.shape[-1],
        SIGNS=signs is not None,
        UNIT=16 if x.shape[-1] % 16 == 0 else 1,
        SEVERAL=x.shape[-1] % 4096 != 0,
        BLOCK=block,
        PRECISE=precise,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=4,
        num_stages=2 if x.dtype == torch.float32 else 3,  # the shared memory of small GPUs
        maxnreg=None if precise or x.dtype == torch.float32 else REGISTERS,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return z
