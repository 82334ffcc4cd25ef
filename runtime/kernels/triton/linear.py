"""linear(x, packed weight) -> y: the op's signature, one of three kernels, or the reference."""

from __future__ import annotations

import torch

from ternc.runtime import dispatch
from ternc.runtime.kernels.triton import dequantize as dequantize_kernel
from ternc.runtime.kernels.triton import launch, select
from ternc.runtime.kernels.triton.linear_float import linear_float
from ternc.runtime.kernels.triton.linear_gemm import linear_gemm
from ternc.runtime.kernels.triton.linear_gemv import linear_gemv
from ternc.runtime.kernels.triton.weight import Weight
from ternc.runtime.ops import dequantize as dequantize_op
from ternc.runtime.ops import linear as linear_op


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
    """x [..., K] -> y [..., N]; free scales and foreign layouts go to the reference, and say so."""
    arguments = (x, weight, scale, multiplier, bias, out_features, group_size)
    linear_op.check_linear(*arguments, activation_bits, layout)
    columns = x.shape[-1]
    packed = _packed(weight, scale, multiplier, out_features, columns, group_size, layout)
    if select.unsupported(packed) or not (columns and out_features):
        return linear_op.reference(*arguments, activation_bits, layout)
    rows = x.reshape(-1, columns).contiguous()
    shape = (*x.shape[:-1], out_features)
    if not len(rows):
        return x.new_empty(shape)
    if bias is not None:
        bias = bias.contiguous()
    if not activation_bits:
        dispatch.record(weight, "triton_float")
        y = linear_float(rows, packed, bias)
    elif len(rows) == 1 and not select.gemv_unsupported(packed, activation_bits):
        dispatch.record(weight, "triton_gemv")
        y = linear_gemv(rows, packed, bias, select.gemv_config(packed, x.device))
    else:
        dispatch.record(weight, "triton_gemm")
        config = select.gemm_config(packed, len(rows), x.device)
        y = linear_gemm(rows, packed, bias, activation_bits, config)
    return y.view(shape)


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The packed weight as floats [N, K]; foreign layouts go to the reference."""
    arguments = (weight, scale, multiplier, out_features, in_features, group_size, layout)
    dequantize_op.check_dequantize(*arguments, dtype)
    if layout < 20:
        return dequantize_op.reference(*arguments, dtype)
    dispatch.record(weight, "triton_dequantize")
    return dequantize_kernel.dequantize(_packed(*arguments), dtype)


def _packed(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
) -> Weight:
    return Weight(
        bytes=weight.contiguous().view(torch.int8),
        scale=scale.contiguous(),
        multiplier=None if multiplier is None else multiplier.contiguous(),
        rows=out_features,
        columns=in_features,
        group_size=group_size,
        layout=layout,
        stable=launch.stable(weight, multiplier),
    )
