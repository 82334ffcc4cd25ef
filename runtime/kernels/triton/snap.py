"""w, scales as they were fitted -> scales as files hold them, codes or values; one launch.

Scales are rounded to fp16 times one power of two of the largest (ternc/formats/scales.py): every
program finds it for itself and then walks over pieces of rows, so nothing is launched in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import CODE_MAX
from ternc.formats.scales import TOP_EXPONENT
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.quantize_act import ROUND_TO_EVEN

BLOCK = 1024
"""Columns, or scales, that a program reads at a time."""

RESIDENT = 8
"""Programs a multiprocessor."""

MOST_CODES: tl.constexpr = tl.constexpr((0, *CODE_MAX.values()))
"""By planes: the largest code."""
TOP: tl.constexpr = tl.constexpr(TOP_EXPONENT)


@triton.jit
def rounded_codes(quotient, MOST: tl.constexpr):
    """rint(quotient) clipped to +-MOST."""
    near = tl.minimum(tl.maximum(quotient, -MOST - 1.0), MOST + 1.0)
    return tl.minimum(tl.maximum((near + ROUND_TO_EVEN) - ROUND_TO_EVEN, -MOST), MOST)


@triton.jit
def power_of_two(exponent):
    """2**exponent as float64, for int32 between -1022 and 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def storage_exponent(largest):
    """Of the power of two that brings the largest scale into [2**(TOP - 1), 2**TOP), int32."""
    normal = largest.to(tl.float64).to(tl.int64, bitcast=True)  # a subnormal fp32 is normal there
    exponent = ((normal >> 52) & 0x7FF).to(tl.int32) - 1022
    return tl.where(largest > 0.0, exponent, 0) - TOP


@triton.jit
def stored(scale, exponent):
    """A scale as files hold it, fp32: at most fp16 times 2**exponent."""
    short = (scale.to(tl.float64) * power_of_two(-exponent)).to(tl.float32).to(tl.float16)
    return (short.to(tl.float64) * power_of_two(exponent)).to(tl.float32)


@triton.jit
def snap_rows(
    w_ptr,
    scale_ptr,
    multiplier_ptr,
    out_ptr,
    stored_ptr,
    N,
    K,
    scales,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """w [N, K] -> codes int8 and what they stand for, or with VALUES s * (m * codes).

    scale_ptr: fp32 [scales], N or 1, as fitted; multiplier_ptr: uint8 [N, groups].
    """
    MOST: tl.constexpr = MOST_CODES[PLANES]
    place = tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, scales, BLOCK):
        part = tl.load(scale_ptr + start + place, mask=start + place < scales, other=0.0)
        largest = tl.maximum(largest, part)
    exponent = storage_exponent(tl.max(largest, axis=0))
    pieces = tl.cdiv(K, BLOCK)
    for piece in range(tl.program_id(0), N * pieces, tl.num_programs(0)):
        n = (piece // pieces).to(tl.int64)
        k = piece % pieces * BLOCK + place
        w = tl.load(w_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        s = stored(tl.load(scale_ptr + (n if ROW_SCALES else 0)), exponent)
        m = tl.full([BLOCK], 1.0, tl.float32)
        if GROUPED:
            group = n * groups + k // group_size
            m = tl.load(multiplier_ptr + group, mask=k < K, other=0).to(tl.float32)
        step = s * m
        codes = rounded_codes(tl.where(step == 0.0, 0.0, tl.math.div_rn(w, step)), MOST)
        result = s * (m * codes) if VALUES else codes
        tl.store(out_ptr + n * K + k, result.to(out_ptr.dtype.element_ty), mask=k < K)
        if not VALUES:
            if ROW_SCALES:
                tl.store(stored_ptr + n, s)
            elif piece == 0:
                tl.store(stored_ptr, s)


def snap(
    w: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    planes: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K], contiguous, and its fit -> (codes (dtype int8), scale as it is stored), or (values
    in a float dtype, `scale` as given).

    Args:
        scale: fp32 [N] or [1], not rounded.
        multiplier: uint8 [N, G] or None.
    """
    rows, columns = w.shape
    out = torch.empty((rows, columns), dtype=dtype, device=w.device)
    values = dtype != torch.int8
    rounded = scale if values else torch.empty_like(scale)
    block = min(launch.power_of_two(columns), BLOCK)
    dependent = launch.dependent_launch(w.device)
    pieces = rows * triton.cdiv(columns, block)
    snap_rows[(min(pieces, RESIDENT * launch.processors(w.device.index or 0)),)](
        w,
        scale,
        scale if multiplier is None else multiplier,
        out,
        rounded,
        rows,
        columns,
        scale.numel(),
        1 if multiplier is None else multiplier.shape[1],
        max(group_size, 1),
        PLANES=planes,
        GROUPED=multiplier is not None,
        ROW_SCALES=scale.numel() == rows,
        VALUES=values,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=max(1, min(4, block // 256)),
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return out, rounded
