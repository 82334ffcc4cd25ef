"""blend_quantize(w, state), blend_quantize_act(x, state) -> values of a blend of two bit-widths.

A row is held in registers and quantised by the two quantisers that the state asks for, of those of
ternc/formats/blend.py; a state on the device is read there. Values of 1.58 bits come from a launch
before. Roundings are those of the reference in the dtype of w, sums are taken in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import MAX_IN_FEATURES
from ternc.formats.blend import FLOAT, GAUSSIAN_STEP, LLOYD_ROUNDS, TERNARY, asked
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.fit import fake_quantize
from ternc.runtime.kernels.triton.quantize_act import (
    ROUND_TO_EVEN,
    magnitude_bits,
    round_to_byte,
    row_scale,
)
from ternc.runtime.ops import blend_quantize as blend_op
from ternc.runtime.ops.fit import check_fit
from ternc.runtime.ops.quantize_act import LEVELS, check_quantize_act

FEW_COLUMNS = 16384
"""Up to here sixteen warps hold a row in their registers; wider ones take twice as many."""

STEP: tl.constexpr = tl.constexpr(GAUSSIAN_STEP)
ROUNDS: tl.constexpr = tl.constexpr(LLOYD_ROUNDS)
FINAL: tl.constexpr = tl.constexpr(TERNARY)
FOUR_BITS: tl.constexpr = tl.constexpr(LEVELS[4][0])
"""Numerator of the quotients of activations of 4 bits."""


@triton.jit
def as_stored(value, dtype: tl.constexpr):
    """fp32 rounded to the values of a dtype."""
    return value.to(dtype).to(tl.float32)


@triton.jit
def largest_magnitude(x):
    """max|x| of fp32 [K]; NaN where there is one."""
    return tl.max(magnitude_bits(x), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def uniform(w, MOST: tl.constexpr, dtype: tl.constexpr):
    """w fp32 [K] -> symmetric values of one scale, the absolute maximum's."""
    scale = as_stored(tl.math.div_rn(largest_magnitude(w), MOST * 1.0), dtype)
    quotient = as_stored(tl.math.div_rn(w, tl.where(scale > 0.0, scale, 1.0)), dtype)
    codes = tl.minimum(tl.maximum((quotient + ROUND_TO_EVEN) - ROUND_TO_EVEN, -MOST - 1.0), MOST)
    return tl.where(scale > 0.0, as_stored(codes * scale, dtype), 0.0)


@triton.jit
def half_steps(w, scale, dtype: tl.constexpr):
    """w / scale rounded to -1.5, -0.5, 0.5 or 1.5."""
    quotient = as_stored(tl.math.div_rn(w, tl.where(scale > 0.0, scale, 1.0)), dtype)
    quotient = tl.where(scale > 0.0, quotient, 0.0)
    return tl.minimum(tl.maximum(tl.floor(quotient), -2.0), 1.0) + 0.5


@triton.jit
def four_levels(w, inside, K, dtype: tl.constexpr):
    """w fp32 [K], zeros where not `inside` -> values of four levels, of least squares."""
    square = tl.sum(as_stored(w * w, dtype), axis=0)
    root = as_stored(tl.math.sqrt_rn(as_stored(tl.math.div_rn(square, K * 1.0), dtype)), dtype)
    scale = as_stored(root * STEP, dtype)
    for _ in tl.static_range(ROUNDS):
        levels = half_steps(w, scale, dtype)
        products = as_stored(tl.sum(as_stored(w * levels, dtype), axis=0), dtype)
        squares = tl.sum(tl.where(inside, levels * levels, 0.0), axis=0)
        refit = as_stored(tl.math.div_rn(products, as_stored(squares, dtype)), dtype)
        scale = tl.where(scale > 0.0, refit, scale)
    return tl.where(scale > 0.0, as_stored(half_steps(w, scale, dtype) * scale, dtype), 0.0)


@triton.jit
def per_token(x, K, BITS: tl.constexpr, dtype: tl.constexpr):
    """x fp32 [K] -> the values of its integers (quantize_act.py)."""
    if BITS == 8:
        inverse, scale = row_scale(largest_magnitude(x), 127.0)
        q = round_to_byte(x, inverse, -127, 127)
    else:
        t = (tl.sum(tl.abs(x).to(tl.float64), axis=0) / K).to(tl.float32)
        inverse, scale = row_scale(t, FOUR_BITS)
        q = round_to_byte(x, inverse, -8, 7)
    return as_stored(q.to(tl.float32) * scale, dtype)


@triton.jit
def quantised(
    bits, values, final_ptr, k, inside, K, FORMATS: tl.constexpr, TOKENS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """A row's values at that of FORMATS which `bits` is; the last one where it is none."""
    chosen = bits * 0.0 + FORMATS[len(FORMATS) - 1]
    for i in tl.static_range(len(FORMATS) - 1):
        chosen = tl.where(tl.abs(bits - FORMATS[i]) < 1e-3, FORMATS[i], chosen)
    found = values
    if chosen == 8.0:
        found = per_token(values, K, 8, dtype) if TOKENS else uniform(values, 127, dtype)
    elif chosen == 4.0:
        found = per_token(values, K, 4, dtype) if TOKENS else uniform(values, 7, dtype)
    if not TOKENS:
        if chosen == 2.0:
            found = four_levels(values, inside, K, dtype)
        elif tl.abs(chosen - FINAL) < 1e-3:
            found = tl.load(final_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def blend_rows(
    w_ptr,
    final_ptr,
    state_ptr,
    out_ptr,
    source,
    target,
    share,
    K,
    FORMATS: tl.constexpr,
    TOKENS: tl.constexpr,
    READ: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a row of w [N, K] -> out; READ: the state is at state_ptr, else in arguments."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    inside = k < K
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if READ:
        source, target = tl.load(state_ptr), tl.load(state_ptr + 1)
        share = as_stored(tl.load(state_ptr + 2), dtype)
    w = tl.load(w_ptr + row + k, mask=inside, other=0.0).to(tl.float32)
    final_row = final_ptr + row
    first = quantised(source, w, final_row, k, inside, K, FORMATS, TOKENS, dtype)
    second = first
    if target != source:
        second = quantised(target, w, final_row, k, inside, K, FORMATS, TOKENS, dtype)
    # As torch.lerp: from the nearer end, which a share of 0 or 1 gives exactly.
    away = second - first
    mixed = tl.where(share < 0.5, first + share * away, second - away * (1.0 - share))
    tl.store(out_ptr + row + k, mixed.to(dtype), mask=inside)


def blend_quantize(
    w: torch.Tensor, state: torch.Tensor, formats: list[float], planes: int, group_size: int
) -> torch.Tensor:
    """w [N, K] -> values in w.dtype: the signature of the op."""
    check_fit(w, planes, group_size, 0)
    if w.dtype == torch.float64:
        return blend_op.weight_reference(w, state, formats, planes, group_size)
    blend_op.check_state("blend_quantize", state, formats, blend_op.WEIGHT_BITS)
    host = None if state.device == w.device else asked(formats, state)
    source, target, share = host or (FLOAT, FLOAT, 0.0)
    final = None
    if TERNARY in (formats if host is None else (source, target)):
        final = fake_quantize(w, planes, group_size)
        if host and target == TERNARY and (source == target or share == 1.0):
            return final
    return _blend(w, final, state, formats, host)


def blend_quantize_act(x: torch.Tensor, state: torch.Tensor, formats: list[float]) -> torch.Tensor:
    """x [..., K] -> values in x.dtype: the signature of the op, one launch."""
    check_quantize_act(x, 8)
    if x.shape[-1] > MAX_IN_FEATURES:
        return blend_op.activation_reference(x, state, formats)
    blend_op.check_state("blend_quantize_act", state, formats, blend_op.ACTIVATION_BITS)
    host = None if state.device == x.device else asked(formats, state)
    return _blend(x, None, state, formats, host, tokens=True)


def _blend(
    w: torch.Tensor,
    final: torch.Tensor | None,
    state: torch.Tensor,
    formats: list[float],
    host: tuple[float, float, float] | None,
    tokens: bool = False,
) -> torch.Tensor:
    """`host`: the state, where it is not on the device of w."""
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if not out.numel():
        return out
    dependent = launch.dependent_launch(w.device)
    rows = w.contiguous().view(-1, w.shape[-1])
    block = launch.power_of_two(rows.shape[1])
    blend_rows[(rows.shape[0],)](
        rows,
        rows if final is None else final,
        rows if host else state.contiguous(),
        out,
        *(host or (FLOAT, FLOAT, 0.0)),
        rows.shape[1],
        FORMATS=tuple(formats),
        TOKENS=tokens,
        READ=host is None,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=max(1, min(16 if block <= FEW_COLUMNS else 32, block // 512)),
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return out
