"""quantize_act(x) -> q int8, scale fp32: one scale per token (row of the last dimension).

8 bits: t = max|x|, q = clamp(rint(x * (127 / t)), -127, 127), scale = t / 127.
4 bits: t = mean|x|, q = clamp(rint(x * (r / t)), -8, 7), scale = t / r, with r = fp32(sqrt(7)).
"""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.runtime.ops.definition import (
    FLOAT_TYPES,
    OpDefinition,
    refuse_gradient,
    unreachable_backward,
)

LEVELS = {8: (127.0, -127, 127), 4: (7.0**0.5, -8, 7)}
"""Numerator of the quotients, least and largest q, by bits."""


def check_quantize_act(x: torch.Tensor, bits: int) -> None:
    """Raise KernelError for what no kernel takes."""
    if x.dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::quantize_act: x is {x.dtype}, not float32, bfloat16 or float16")
    if bits not in LEVELS:
        raise KernelError(f"ternc::quantize_act: bits={bits}, not 8 or 4")
    if x.dim() == 0:
        raise KernelError("ternc::quantize_act: x is a scalar; it needs a dimension of features")


def reference(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] fp32, bf16 or fp16 -> (q int8 [..., K], scale fp32 [..., 1]).

    Order of operations, all fp32 and round-to-nearest, so that every kernel gives equal bits:
    x is converted to fp32; t is max|x|, or for 4 bits mean|x| = fp32(float64 sum of |x| / K) with
    the quotient in float64; one division `inverse = top / t`, one product `x * inverse` that is not
    contracted with anything, round half to even, clamp; one division `scale = t / top`.

    A row whose `top / t` is infinite (all zero, or t under about 4e-37) counts as zero: q = 0,
    scale = 0. A row with NaN or infinity gets scale NaN and q = 0; other rows are untouched.
    """
    check_quantize_act(x, bits)
    top, least, most = LEVELS[bits]
    x = x.float().contiguous()
    if bits == 8:
        t = x.abs().amax(-1, keepdim=True)
    else:
        t = x.abs().sum(-1, keepdim=True, dtype=torch.float64)
        t = (t / torch.full_like(t, x.shape[-1])).float()  # CUDA divides by scalars inexactly
    numerator = torch.full_like(t, top)  # a scalar numerator would become a reciprocal
    inverse = numerator / t
    scale = t / numerator
    finite = t.isfinite()
    codes = (x * inverse).round().clamp(least, most)
    codes = torch.where(finite & inverse.isfinite(), codes, 0.0)
    scale = torch.where(inverse.isinf(), 0.0, scale)
    return codes.to(torch.int8), torch.where(finite, scale, torch.nan)


def fake(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantize_act(x, bits)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def dequantized(x: torch.Tensor, bits: int) -> torch.Tensor:
    """q * scale in fp32 [..., K]: the activations that `ternc::linear` multiplies."""
    q, scale = torch.ops.ternc.quantize_act(x, bits)
    return q * scale


QUANTIZE_ACT = OpDefinition(
    name="quantize_act",
    schema="(Tensor x, int bits) -> (Tensor q, Tensor scale)",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient("quantize_act", "use ternc::fake_quantize_act"),
    backward=unreachable_backward,
)
