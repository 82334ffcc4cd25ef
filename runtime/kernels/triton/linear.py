"""linear(x, packed weight) -> y, linears1..4(x or q, packed weights) -> y_i: the ops' signatures.

One of three kernels, or the reference. Weights of one kind are multiplied by one launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.runtime import dispatch
from ternc.runtime.kernels.triton import linear_gemm, linear_int8, select
from ternc.runtime.kernels.triton.linear_float import linear_float
from ternc.runtime.kernels.triton.linear_free import linear_free
from ternc.runtime.kernels.triton.linear_gemm import Integers
from ternc.runtime.kernels.triton.linear_gemv import linear_gemv
from ternc.runtime.kernels.triton.product import Product, alike
from ternc.runtime.kernels.triton.weight import Weight
from ternc.runtime.ops import linear as linear_op
from ternc.runtime.ops import linears as linears_op
from ternc.runtime.ops import linears1 as linears1_op

ALIGNMENT = 16
"""Bytes of a row of integers that kernels load at once."""


def linear(
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
    """x [..., K] -> y [..., N]; what has no kernel goes to the reference, and says so."""
    arguments = (x, weight, scale, multiplier, bias, out_features, group_size)
    linear_op.check_linear(*arguments, activation_bits, layout)
    columns = x.shape[-1]
    packed = Weight.of(weight, scale, multiplier, out_features, columns, group_size, layout)
    if select.unsupported(packed) or not (columns and out_features):
        return linear_op.reference(*arguments, activation_bits, layout)
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel():
        biases = None if bias is None else (bias.contiguous(),)
        product = Product((packed,), biases, (y.view(-1, out_features),))
        _multiply(*_rows(x, None), product, activation_bits)
    return y


def linears1(
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
    """x [..., K], or integers with scales sx -> y [..., N]; as `linear`, plus a residual."""
    arguments = (x, sx, weight, scale, multiplier, bias, residual, out_features, group_size)
    linears1_op.check_linears1(*arguments, activation_bits, layout, dtype)
    columns = x.shape[-1]
    packed = Weight.of(weight, scale, multiplier, out_features, columns, group_size, layout)
    if select.unsupported(packed) or not (columns and out_features):
        return linears1_op.reference(*arguments, activation_bits, layout, dtype)
    y = x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    if y.numel():
        product = Product(
            weights=(packed,),
            biases=None if bias is None else (bias.contiguous(),),
            outputs=(y.view(-1, out_features),),
            residual=None if residual is None else residual.contiguous(),
        )
        _multiply(*_rows(x, sx), product, activation_bits)
    return y


def linears(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    multipliers: list[torch.Tensor],
    biases: list[torch.Tensor],
    out_features: list[int],
    group_sizes: list[int],
    activation_bits: int,
    layouts: list[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """x [..., K], or integers with scales sx -> y_i [..., N_i]; as `linear` for every weight."""
    arguments = (x, sx, weights, scales, multipliers, biases, out_features, group_sizes)
    linears_op.check_linears(*arguments, activation_bits, layouts, dtype)
    columns, given = x.shape[-1], linears_op.given
    packed = all_packed(weights, scales, multipliers, out_features, columns, group_sizes, layouts)
    if any(select.unsupported(each) for each in packed) or not (columns and all(out_features)):
        return linears_op.reference(*arguments, activation_bits, layouts, dtype)
    outputs = [x.new_empty((*x.shape[:-1], rows), dtype=dtype) for rows in out_features]
    if outputs[0].numel():
        rows_of_x = _rows(x, sx)
        some = [None if given(bias) is None else bias.contiguous() for bias in biases]
        for positions in alike(packed, some):
            product = Product(
                weights=tuple(packed[i] for i in positions),
                biases=tuple(b for i in positions if (b := some[i]) is not None) or None,
                outputs=tuple(outputs[i].view(-1, out_features[i]) for i in positions),
            )
            _multiply(*rows_of_x, product, activation_bits)
    return tuple(outputs)


def all_packed(
    weights: list[torch.Tensor],
    scales: list[torch.Tensor],
    multipliers: list[torch.Tensor],
    out_features: list[int],
    columns: int,
    group_sizes: list[int],
    layouts: list[int],
) -> list[Weight]:
    """The weights of an op's lists."""
    return [
        Weight.of(weight, scale, linears_op.given(multiplier), rows, columns, group_size, layout)
        for weight, scale, multiplier, rows, group_size, layout in zip(
            weights, scales, multipliers, out_features, group_sizes, layouts, strict=True
        )
    ]


def _rows(x: torch.Tensor, sx: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [..., K] -> [M, K], contiguous, with its scales [M]."""
    return (
        x.reshape(-1, x.shape[-1]).contiguous(),
        None if sx is None else sx.reshape(-1).contiguous(),
    )


def _multiply(
    x: torch.Tensor, sx: torch.Tensor | None, product: Product, activation_bits: int
) -> None:
    """x [M, K] floating point, or int8 with scales sx [M] -> product.outputs."""
    weight, tokens, device = product.joint, x.shape[0], x.device
    if not activation_bits:
        kernel = "triton_float"
        linear_float(x, product)
    elif weight.layout == linear_int8.LAYOUT or weight.free_scales:
        kernel = "triton_free" if weight.free_scales else "triton_int8"
        multiply = linear_free if weight.free_scales else linear_int8.linear_int8
        integers = Integers(aligned(x), sx) if sx is not None else None
        multiply(integers or linear_int8.quantize(x, activation_bits), product)
    elif tokens == 1 and not select.gemv_unsupported(weight, activation_bits, sx is not None):
        kernel = "triton_gemv"
        x, kind = (x, select.GEMV) if sx is None else (aligned(x), select.INTEGERS)
        linear_gemv(x, sx, product, select.gemv_config(weight, device, kind))
    else:
        kernel = "triton_gemm"
        config = select.gemm_config(weight, tokens, device)
        if sx is None:
            integers = linear_gemm.quantize(x, product, activation_bits, config)
        else:
            integers = Integers(aligned(x), sx)
        linear_gemm.linear_gemm(integers, product, config)
    for each in product.weights:
        dispatch.record(each.bytes, kernel)


def aligned(q: torch.Tensor) -> torch.Tensor:
    """q int8 [M, K], contiguous, its rows aligned; K padded with zeros where that takes it."""
    if missing := -q.shape[1] % ALIGNMENT:
        return F.pad(q, (0, missing))
    return q.clone() if q.data_ptr() % ALIGNMENT else q
