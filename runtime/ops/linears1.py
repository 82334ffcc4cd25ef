"""linears1(x, W, residual) -> linear(x, W) + residual: one weight as a fused call has it.

The input may already be integers (q, sx). No lists and no words among the arguments: compiled C++
then calls it without the Python interpreter.
"""

from __future__ import annotations

from typing import Any

import torch

from ternc.errors import DifferentiationError, KernelError
from ternc.runtime.ops import dequantize, linear, linears
from ternc.runtime.ops.definition import FLOAT_TYPES, OpDefinition


def check_linears1(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> None:
    """Raise KernelError for what no kernel takes."""
    linears.check_input("linears1", x, sx, activation_bits, dtype)
    if bias is not None and (bias.dtype not in FLOAT_TYPES or tuple(bias.shape) != (out_features,)):
        raise KernelError(
            f"ternc::linears1: bias is {bias.dtype} {list(bias.shape)}, not a float "
            f"[{out_features}]"
        )
    if residual is not None and (
        residual.dtype != dtype or residual.shape != (*x.shape[:-1], out_features)
    ):
        raise KernelError(
            f"ternc::linears1: residual is {residual.dtype} {list(residual.shape)}, not {dtype} "
            f"{[*x.shape[:-1], out_features]}"
        )
    dequantize.check_packed(
        "linears1", weight, scale, multiplier, out_features, x.shape[-1], group_size, layout
    )


def reference(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [..., K] -> y [..., N] in `dtype`, as `ternc::linear` defines it, plus the residual.

    sx: None, and x is floating point; or fp32 [..., 1], and x holds the integers q.
    residual [..., N] in `dtype`: added to the output after its rounding to `dtype`, and rounded
    again, as the two separate operations do.
    """
    numbers = (out_features, group_size, activation_bits, layout, dtype)
    check_linears1(x, sx, weight, scale, multiplier, bias, residual, *numbers)
    y = linears.product(x, sx, weight, scale, multiplier, bias, *numbers)
    return y if residual is None else y + residual


def fake(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    numbers = (out_features, group_size, activation_bits, layout, dtype)
    check_linears1(x, sx, weight, scale, multiplier, bias, residual, *numbers)
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, sx, weight, scale, multiplier, bias, residual, *numbers = inputs
    if scale.requires_grad or (sx is not None and sx.requires_grad):
        raise DifferentiationError(
            "ternc::linears1 has no gradient with respect to scales; call ternc::linear"
        )
    ctx.save_for_backward(weight, scale, multiplier)
    ctx.out_features, ctx.group_size, _, ctx.layout, ctx.dtype = numbers
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x (straight through the quantiser), bias and the residual."""
    weight, scale, multiplier = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        shape = (ctx.out_features, ctx.in_features, ctx.group_size, ctx.layout)
        w = torch.ops.ternc.dequantize(weight, scale, multiplier, *shape, ctx.dtype)
        grad_x = grad.to(ctx.dtype) @ w
    if ctx.bias_dtype is not None:
        grad_bias = linear.bias_gradient(grad, ctx.out_features, ctx.bias_dtype)
    grad_residual = grad if ctx.has_residual else None
    return (grad_x, None, None, None, None, grad_bias, grad_residual, *[None] * 5)


LINEARS1 = OpDefinition(
    name="linears1",
    schema="(Tensor x, Tensor? sx, Tensor weight, Tensor scale, Tensor? multiplier, Tensor? bias, "
    "Tensor? residual, int out_features, int group_size, int activation_bits, int layout, "
    "ScalarType dtype) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
)
