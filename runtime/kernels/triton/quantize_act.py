"""quantize_act(x) -> q, scale: q = rint(x * (top / t)), t = max|x| or mean|x| of the row.

Exactly the reference's arithmetic (ternc/runtime/ops/quantize_act.py): divisions are correctly
rounded, nothing is contracted. q may be padded with zeros, as `linear_gemm` reads it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.ops.quantize_act import LEVELS, check_quantize_act

WHOLE_ROW = 16384
"""Columns that one program keeps in registers; longer rows are read twice."""

FEW_ROWS = 128
"""Up to here the latency of a row counts."""

LATE_ROWS = range(FEW_ROWS + 1, 513)
"""Here the next kernel is not let in early: its programs would share processors unevenly with
these (1.02x the time of product and quantisation at 256 rows, 0.96x to 1 at 2,048).
"""

TILES = (16, 256)
"""Rows of q that storage is whole multiples of, at least and at most (a power of two between)."""

INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
ROUND_TO_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2**23, where an ulp is 1: adding it rounds half to even."""
ROUND_TO_EVEN_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def row_scale(t, TOP: tl.constexpr):
    """t fp32 -> (top / t or 0, scale): zero rows and non-finite rows have inverse 0."""
    inverse = tl.math.div_rn(TOP, t)
    scale = tl.math.div_rn(t, TOP)
    finite = (t.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITY_BITS
    usable = (inverse.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < INFINITY_BITS
    scale = tl.where(usable, scale, 0.0)
    scale = tl.where(finite, scale, float("nan"))
    return tl.where(finite & usable, inverse, 0.0), scale


@triton.jit
def for_one_rounding(inverse, t):
    """The `inverse` of a row with which rint(x * inverse) of the exact product is that of the
    product rounded to fp32, for |x| <= t of 8 significant bits each (bf16) and 8 bits of q.

    127 x / t lies further from half an integer than rounding reaches, or t is a power of two and
    all is exact, but for |x| = t / 2: its 63.5 rounds to 64, and an inverse below 127 / t gives 63.
    """
    exactly_below = (0.5 * t * inverse == 63.5) & (tl.fma(0.5 * t, inverse, -63.5) < 0.0)
    bits = inverse.to(tl.int32, bitcast=True)
    return tl.where(exactly_below, bits + 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """|x| of fp32 as int32, in the same order; above INFINITY_BITS for NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_to_byte(x, inverse, LEAST: tl.constexpr, MOST: tl.constexpr):
    """rint(x * inverse) in [LEAST, MOST] as int32; 0 where inverse is 0."""
    product = tl.where(inverse == 0.0, 0.0, x * inverse)
    if LEAST != -127:  # |x| <= t keeps 8 bits within +-127
        product = tl.minimum(tl.maximum(product, LEAST - 1.0), MOST + 1.0)
    q = (product + ROUND_TO_EVEN).to(tl.int32, bitcast=True) - ROUND_TO_EVEN_BITS
    if LEAST != -127:
        q = tl.minimum(tl.maximum(q, LEAST), MOST)
    return q


@triton.jit
def bytes_of(x, inverse, LEAST: tl.constexpr, MOST: tl.constexpr, ASM: tl.constexpr):
    """`round_to_byte` as int8; with ASM four at a time.

    The product of bf16 x is not rounded before the sum: `inverse` is `for_one_rounding`.
    """
    if LEAST == -127 and ASM and x.dtype == tl.bfloat16:
        # As below, from pairs: each becomes two fp32 by a shift and a mask.
        mask = tl.where(inverse == 0.0, 0, -1)
        q = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, m; mov.b32 m, 0x4B400000;"
            " shl.b32 a, $1, 16; and.b32 b, $1, 0xFFFF0000;"
            " shl.b32 c, $2, 16; and.b32 d, $2, 0xFFFF0000;"
            " fma.rn.f32 a, a, $3, m; fma.rn.f32 b, b, $3, m;"
            " fma.rn.f32 c, c, $3, m; fma.rn.f32 d, d, $3, m;"
            " prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040;"
            " prmt.b32 a, a, c, 0x5410; and.b32 $0, a, $7; }",
            "=r,r,r,r,r,r,r,r,r,r,r",
            [x.to(tl.int16, bitcast=True), inverse.to(tl.int32, bitcast=True), mask],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    elif LEAST == -127 and ASM:
        # The low bytes of the sums are q; of NaN they are not, and the row's mask clears them.
        sums = (x.to(tl.float32) * inverse + ROUND_TO_EVEN).to(tl.int32, bitcast=True)
        mask = tl.where(inverse == 0.0, 0, -1)
        q = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040;"
            " prmt.b32 a, a, b, 0x5410; and.b32 $0, a, $5; }",
            "=r,r,r,r,r,r,r,r,r",
            [sums, mask],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        q = round_to_byte(x.to(tl.float32), inverse, LEAST, MOST).to(tl.int8)
    return q


@triton.jit
def written(q, scale, VALUES: tl.constexpr):
    """q int32, or with VALUES q * scale in fp32."""
    return q.to(tl.float32) * scale if VALUES else q


@triton.jit
def quantize_rows(
    x_ptr,
    q_ptr,
    scale_ptr,
    count_ptr,
    counts,
    K,
    padded,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    VALUES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a row: x [M, K] -> q int8 [M, padded], scale fp32 [M]; zeros at count_ptr.

    With VALUES q * scale is written in place of q, and no scale.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x_row, q_row = x_ptr + row * K, q_ptr + row * padded
    if DEPENDENT:
        gdc_wait()
        if EARLY:
            gdc_launch_dependents()
    if tl.program_id(0) == 0:
        for start in range(0, counts, BLOCK):
            tl.store(count_ptr + start + k, tl.zeros([BLOCK], tl.int32), mask=start + k < counts)
    if WHOLE:
        x = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
        if BITS == 8:
            t = tl.max(magnitude_bits(x), axis=0).to(tl.float32, bitcast=True)
        else:
            t = (tl.sum(tl.abs(x).to(tl.float64), axis=0) / K).to(tl.float32)
        inverse, scale = row_scale(t, TOP)
        q = written(round_to_byte(x, inverse, LEAST, MOST), scale, VALUES)
        tl.store(q_row + k, q.to(q_ptr.dtype.element_ty), mask=k < padded)
    else:
        largest = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, K, BLOCK):
            x = tl.load(x_row + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            if BITS == 8:
                largest = tl.maximum(largest, magnitude_bits(x))
            else:
                total += tl.abs(x).to(tl.float64)
        if BITS == 8:
            t = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        else:
            t = (tl.sum(total, axis=0) / K).to(tl.float32)
        inverse, scale = row_scale(t, TOP)
        for start in range(0, padded, BLOCK):
            x = tl.load(x_row + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            q = written(round_to_byte(x, inverse, LEAST, MOST), scale, VALUES)
            tl.store(q_row + start + k, q.to(q_ptr.dtype.element_ty), mask=start + k < padded)
    if not VALUES:
        tl.store(scale_ptr + row, scale)


def launch_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    counts: torch.Tensor | None = None,
) -> None:
    """x [M, K], contiguous -> q int8 [M, >= K] (the rest zeros), scale fp32 [M]; zeros `counts`.

    Without a scale, q [M, K] takes the values q * scale in its floating-point dtype.
    """
    rows, columns = x.shape
    top, least, most = LEVELS[bits]
    block = min(launch.power_of_two(q.shape[1]), WHOLE_ROW)
    dependent = launch.dependent_launch(x.device)
    quantize_rows[(rows,)](
        x,
        q,
        q if scale is None else scale,
        q if counts is None else counts,
        0 if counts is None else counts.numel(),
        columns,
        q.shape[1],
        BITS=bits,
        TOP=top,
        LEAST=least,
        MOST=most,
        BLOCK=block,
        WHOLE=block >= q.shape[1],
        VALUES=scale is None,
        DEPENDENT=dependent,
        EARLY=rows not in LATE_ROWS,
        # Few rows: the latency of one counts; many: their number keeps the processors busy.
        num_warps=max(1, min(16, block // 256) if rows <= FEW_ROWS else min(8, block // 512)),
        launch_pdl=dependent,
        **launch.EXACT,
    )


def empty_rows(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """q int8 [..., K] of a shape, undefined, in storage that goes on to whole tiles of rows.

    Products have tiles copied by their place in a tensor (`linear_gemm`); one that ends beyond the
    tensor is slow (37 tokens, 4096 -> 14336: 17.5 us, of whole tiles 11.3).
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    tile = 1 if rows == 1 else min(max(launch.power_of_two(rows), TILES[0]), TILES[1])
    held = torch.empty((-(-rows // tile) * tile, columns), dtype=torch.int8, device=device)
    return held[:rows].view(shape)


def quantize_act(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> q int8 [..., K], scale fp32 [..., 1]; the signature of the op."""
    q = empty_rows(x.shape, x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if scale.numel():
        rows = x.contiguous().view(-1, x.shape[-1])
        launch_rows(rows, q.view(rows.shape), scale.view(-1), bits)
    return q, scale


def fake_quantize_act(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., K] -> q * scale in x.dtype; the signature of the op, one launch."""
    check_quantize_act(x, bits)
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if values.numel():
        rows = x.contiguous().view(-1, x.shape[-1])
        launch_rows(rows, values.view(rows.shape), None, bits)
    return values
