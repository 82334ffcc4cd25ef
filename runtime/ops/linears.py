"""linears2..4(x, packed weights) -> (linear(x, W_i) for each i): one input, quantised once.

The input may already be integers (q, sx), as a fused norm or activation leaves them. One op for
each number of weights: a tuple of tensors can be called from compiled C++, a list cannot.
"""

from __future__ import annotations

from typing import Any

import torch

from ternc.errors import DifferentiationError, KernelError
from ternc.formats.quantized import Quantized
from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize, linear
from ternc.runtime.ops.definition import FLOAT_TYPES, OpDefinition

_Tensors = list[torch.Tensor]

MAX_WEIGHTS = 4
"""Most weights of one call."""


def check_linears(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    activation_bits: int,
    layouts: list[int],
    dtype: torch.dtype,
) -> None:
    """Raise KernelError for what no kernel takes."""
    lists = (scales, multipliers, biases, out_features, group_sizes, layouts)
    if not weights or any(len(values) != len(weights) for values in lists):
        raise KernelError(
            f"ternc::linears: lists of {[len(values) for values in (weights, *lists)]} entries"
        )
    check_input("linears", x, sx, activation_bits, dtype)
    for i in range(len(weights)):
        dequantize.check_packed(
            "linears",
            weights[i],
            scales[i],
            given(multipliers[i]),
            out_features[i],
            x.shape[-1],
            group_sizes[i],
            layouts[i],
        )


def check_input(
    op: str, x: torch.Tensor, sx: torch.Tensor | None, activation_bits: int, dtype: torch.dtype
) -> None:
    """Raise KernelError where x, or q with its scales, is no input of a product in `dtype`."""
    if dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::{op}: output {dtype}, not float32, bfloat16 or float16")
    if activation_bits not in linear.ACTIVATION_BITS or (sx is not None and not activation_bits):
        raise KernelError(f"ternc::{op}: activation_bits={activation_bits}, not 8, 4 or 0")
    if sx is None and x.dtype != dtype:
        raise KernelError(f"ternc::{op}: x is {x.dtype}, its outputs {dtype}")
    if sx is not None and (
        x.dtype != torch.int8 or sx.dtype != torch.float32 or sx.shape != (*x.shape[:-1], 1)
    ):
        raise KernelError(
            f"ternc::{op}: q is {x.dtype} {list(x.shape)} with scales {sx.dtype} "
            f"{list(sx.shape)}, not int8 [..., K] with float32 [..., 1]"
        )


def given(tensor: torch.Tensor) -> torch.Tensor | None:
    """An entry of `multipliers` or `biases`: an empty tensor stands for none."""
    return tensor if tensor.numel() else None


def reference(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    activation_bits: int,
    layouts: list[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """x [..., K] -> y_i [..., N_i] in `dtype`, each as `ternc::linear` defines it.

    sx: None, and x is floating point; or fp32 [..., 1], and x holds the integers q.
    An empty tensor in `multipliers` or `biases` stands for none.
    """
    check_linears(
        x,
        sx,
        weights,
        scales,
        multipliers,
        biases,
        out_features,
        group_sizes,
        activation_bits,
        layouts,
        dtype,
    )
    outputs = []
    for i, weight in enumerate(weights):
        multiplier, bias = given(multipliers[i]), given(biases[i])
        arguments = (out_features[i], group_sizes[i], activation_bits, layouts[i], dtype)
        outputs.append(product(x, sx, weight, scales[i], multiplier, bias, *arguments))
    return tuple(outputs)


def product(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (or q with sx) times one weight -> y [..., N] in `dtype`."""
    numbers = (out_features, group_size, activation_bits, layout)
    if sx is None:
        return linear.reference(x, weight, scale, multiplier, bias, *numbers)
    dispatch.record(weight, "reference")
    quantized: Quantized = dequantize.unpack(
        weight, scale, multiplier, out_features, x.shape[-1], group_size, layout
    )
    return linear.integer_linear(x, sx, quantized, bias).to(dtype)


def fake(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    activation_bits: int,
    layouts: list[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    check_linears(
        x,
        sx,
        weights,
        scales,
        multipliers,
        biases,
        out_features,
        group_sizes,
        activation_bits,
        layouts,
        dtype,
    )
    return tuple(x.new_empty((*x.shape[:-1], n), dtype=dtype) for n in out_features)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, sx, weights, scales, multipliers, biases, *numbers = inputs
    if sx is not None and any(t is not None and t.requires_grad for t in (sx, *scales)):
        raise DifferentiationError(
            "ternc::linears has no gradient with respect to scales where its input is integers; "
            "call ternc::linear"
        )
    ctx.count = len(weights)
    ctx.save_for_backward(*weights, *scales, *multipliers)
    ctx.out_features, ctx.group_sizes, _, ctx.layouts, ctx.dtype = numbers
    ctx.bias_dtypes = [bias.dtype if bias.numel() else None for bias in biases]
    ctx.in_features, ctx.integers = x.shape[-1], sx is not None
    ctx.wants_scales = any(scale.requires_grad for scale in scales)


def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    """Gradients of x (straight through the quantiser) and of biases."""
    if ctx.wants_scales:
        raise DifferentiationError(
            "ternc::linears has no gradient of its scales; call ternc::linear"
        )
    tensors, n = ctx.saved_tensors, ctx.count
    weights, scales, multipliers = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    grad_x = None
    if ctx.needs_input_grad[0]:
        for i, grad in enumerate(grads):
            shape = (ctx.out_features[i], ctx.in_features, ctx.group_sizes[i], ctx.layouts[i])
            multiplier = given(multipliers[i])
            w = torch.ops.ternc.dequantize(weights[i], scales[i], multiplier, *shape, ctx.dtype)
            part = grad.to(ctx.dtype) @ w
            grad_x = part if grad_x is None else grad_x + part
    grad_biases = [
        None if dtype is None else linear.bias_gradient(grad, n_out, dtype)
        for grad, dtype, n_out in zip(grads, ctx.bias_dtypes, ctx.out_features, strict=True)
    ]
    nones = [None] * n
    # One entry per argument, a list per list of tensors.
    return (grad_x, None, nones, nones, nones, grad_biases, *[None] * 5)


LINEARS = tuple(
    OpDefinition(
        name=f"linears{count}",
        schema="(Tensor x, Tensor? sx, Tensor[] weights, Tensor[] scales, Tensor[] multipliers, "
        "Tensor[] biases, int[] out_features, int[] group_sizes, int activation_bits, "
        f"int[] layouts, ScalarType dtype) -> ({', '.join(['Tensor'] * count)})",
        reference=reference,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
    )
    for count in range(2, MAX_WEIGHTS + 1)
)
