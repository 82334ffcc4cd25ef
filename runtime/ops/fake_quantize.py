"""fake_quantize(w), fake_quantize_act(x) -> quantised values as floats, gradient straight through.

Both call the op that packs (ternc::fit, ternc::quantize_act): training sees inference's codes.
"""

from __future__ import annotations

from typing import Any

import torch

from ternc.formats.quantized import Quantized
from ternc.runtime.ops.definition import OpDefinition
from ternc.runtime.ops.fit import check_fit
from ternc.runtime.ops.quantize_act import LEVELS, check_quantize_act


def weight_reference(w: torch.Tensor, planes: int, group_size: int) -> torch.Tensor:
    """w [N, K] -> s * m * c of its closed-form tied fit, in w.dtype."""
    codes, scale, multiplier = torch.ops.ternc.fit(w, planes, group_size, 0)
    quantized = Quantized(
        codes=codes,
        scale=scale,
        multiplier=multiplier if group_size > 0 else None,
        group_size=max(group_size, 0),
        planes=planes,
    )
    return quantized.dequantize().to(w.dtype)


def weight_fake(w: torch.Tensor, planes: int, group_size: int) -> torch.Tensor:
    check_fit(w, planes, group_size, 0)
    return w.new_empty(w.shape)


def activation_reference(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., K] -> q * scale of `quantize_act`, in x.dtype."""
    q, scale = torch.ops.ternc.quantize_act(x, bits)
    return (q * scale).to(x.dtype)


def activation_composite(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The values of `activation_reference` in ops that a compiler fuses with their neighbours.

    In eager mode equal but for the fp32 sums of 4 bits; fused, a quotient may round otherwise.
    """
    check_quantize_act(x, bits)
    top, least, most = LEVELS[bits]
    values = x.float()
    magnitude = values.abs()
    t = magnitude.amax(-1, keepdim=True) if bits == 8 else magnitude.mean(-1, keepdim=True)
    numerator = torch.full_like(t, top)
    inverse = numerator / t
    rounded = (values * inverse).round().clamp(least, most) * (t / numerator)
    return torch.where(inverse.isinf(), 0.0, rounded).to(x.dtype)


def activation_fake(x: torch.Tensor, bits: int) -> torch.Tensor:
    check_quantize_act(x, bits)
    return x.new_empty(x.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.numbers = len(inputs) - 1


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Straight through: d output / d input = 1, nothing clipped."""
    return (grad, *[None] * ctx.numbers)


FAKE_QUANTIZE = OpDefinition(
    name="fake_quantize",
    schema="(Tensor w, int planes, int group_size) -> Tensor",
    reference=weight_reference,
    fake=weight_fake,
    setup_context=setup_context,
    backward=backward,
)

FAKE_QUANTIZE_ACT = OpDefinition(
    name="fake_quantize_act",
    schema="(Tensor x, int bits) -> Tensor",
    reference=activation_reference,
    fake=activation_fake,
    setup_context=setup_context,
    backward=backward,
)
