"""linear(x, packed weight) -> y = (sum_k q * m * c) * sx * s + b: the op every Linear becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ternc.errors import KernelError
from ternc.formats.quantized import Quantized, expand_groups
from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize, quantize_act
from ternc.runtime.ops.definition import FLOAT_TYPES, OpDefinition

ACTIVATION_BITS = (8, 4, 0)
"""0: activations stay floating point."""


def check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
) -> None:
    """Raise KernelError for what no kernel takes."""
    if x.dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::linear: x is {x.dtype}, not float32, bfloat16 or float16")
    if x.dim() == 0:
        raise KernelError("ternc::linear: x is a scalar; it needs a dimension of features")
    if activation_bits not in ACTIVATION_BITS:
        raise KernelError(f"ternc::linear: activation_bits={activation_bits}, not 8, 4 or 0")
    if bias is not None and (bias.dtype not in FLOAT_TYPES or tuple(bias.shape) != (out_features,)):
        raise KernelError(
            f"ternc::linear: bias is {bias.dtype} {list(bias.shape)}, not a float [{out_features}]"
        )
    dequantize.check_packed(
        "linear", weight, scale, multiplier, out_features, x.shape[-1], group_size, layout
    )


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
) -> torch.Tensor:
    """x [..., K] fp32, bf16 or fp16 -> y [..., N] in x.dtype.

    Tied scales: (float(sum over k of q * m * c) * sx) * s[n] + b[n] in fp32, in that order, with an
    exact integer sum; free scales: (sum over groups, ascending, of float(sum_g) * s[n, g]) * sx +
    b[n]. activation_bits 0: x in place of q, sx = 1, and the sum rounded to fp32. A row of x with
    NaN or infinity gives a NaN row.
    """
    check_linear(
        x, weight, scale, multiplier, bias, out_features, group_size, activation_bits, layout
    )
    dispatch.record(weight, "reference")
    quantized = dequantize.unpack(
        weight, scale, multiplier, out_features, x.shape[-1], group_size, layout
    )
    if activation_bits:
        q, sx = quantize_act.reference(x, activation_bits)
    else:
        q = x.float()
        finite = q.isfinite().all(-1, keepdim=True)
        sx = torch.where(finite, 1.0, torch.nan)
        q = torch.where(finite, q, 0.0)
    return integer_linear(q, sx, quantized, bias).to(x.dtype)


def integer_linear(
    q: torch.Tensor, sx: torch.Tensor, quantized: Quantized, bias: torch.Tensor | None
) -> torch.Tensor:
    """q [..., K] with scales sx [..., 1] -> fp32 [..., N], before the rounding to an output
    dtype.
    """
    y = _free_sum(q, quantized) * sx if quantized.free_scales else _tied_sum(q, sx, quantized)
    return y if bias is None else y + bias.float()


def _tied_sum(q: torch.Tensor, sx: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """(float(sum) * sx) * s, fp32 [..., N]. float64 holds every int32 sum exactly."""
    codes = quantized.codes.double()
    if quantized.multiplier is not None:
        codes *= expand_groups(quantized.multiplier, quantized.group_size, quantized.shape[1])
    return (q.double() @ codes.T).float() * sx * quantized.scale


def _free_sum(q: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """Sum over groups, ascending, of float(sum_g) * s[n, g]; fp32 [..., N]."""
    total = q.new_zeros((*q.shape[:-1], quantized.shape[0]), dtype=torch.float32)
    size = quantized.group_size
    groups = zip(q.double().split(size, -1), quantized.codes.double().split(size, -1), strict=True)
    for group, (q_group, codes) in enumerate(groups):
        total = total + (q_group @ codes.T).float() * quantized.scale[:, group]
    return total


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
) -> torch.Tensor:
    check_linear(
        x, weight, scale, multiplier, bias, out_features, group_size, activation_bits, layout
    )
    return x.new_empty((*x.shape[:-1], out_features))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, scale, multiplier, bias, *numbers = inputs
    # x is only needed for the gradient of the scales: not kept alive without it.
    ctx.save_for_backward(x if scale.requires_grad else None, weight, scale, multiplier)
    ctx.numbers = numbers
    ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x (straight through the activation quantiser), scale and bias; none of codes."""
    x, weight, scale, multiplier = ctx.saved_tensors
    out_features, group_size, activation_bits, layout = ctx.numbers
    shape = (out_features, ctx.in_features, group_size, layout)
    wants_x, _, wants_scale, _, wants_bias = ctx.needs_input_grad[:5]
    grad_x = grad_scale = grad_bias = None
    if wants_x:
        w = torch.ops.ternc.dequantize(weight, scale, multiplier, *shape, ctx.dtype)
        grad_x = grad.to(ctx.dtype) @ w
    if wants_scale:
        if activation_bits:
            x = quantize_act.dequantized(x, activation_bits)
        # dW of the unscaled weight m * c, then the sum of each scale's elements.
        unit = torch.ops.ternc.dequantize(
            weight, torch.ones_like(scale), multiplier, *shape, torch.float32
        )
        rows = grad.reshape(-1, out_features).float()
        product = rows.T @ x.reshape(-1, ctx.in_features).float() * unit
        grad_scale = _sum_to_scale(product, scale, group_size)
    if wants_bias:
        grad_bias = bias_gradient(grad, out_features, ctx.bias_dtype)
    return (grad_x, None, grad_scale, None, grad_bias, None, None, None, None)


def bias_gradient(grad: torch.Tensor, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradient [N] of a bias from that of the output [..., N], summed in fp32."""
    return grad.reshape(-1, out_features).sum(0, dtype=torch.float32).to(dtype)


def _sum_to_scale(product: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> the shape of scale: [1], [N] or [N, G]."""
    if scale.dim() == 2:
        groups = product.split(group_size, 1)
        return torch.stack([group.sum(1) for group in groups], 1)
    rows = product.sum(1)
    return rows if scale.shape == rows.shape else rows.sum(0, keepdim=True)


def autocast(device_type: str) -> Callable[..., torch.Tensor]:
    """The op under autocast: x in the autocast dtype; scales and bias stay as they are."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def linear_autocast(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.device.type == device_type and x.dtype in FLOAT_TYPES:
            x = x.to(torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.ternc.linear(x, *rest)

    return linear_autocast


LINEAR = OpDefinition(
    name="linear",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? multiplier, Tensor? bias, "
    "int out_features, int group_size, int activation_bits, int layout) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
    autocast=autocast,
)
