"""dequantize(packed weight) -> W [N, K]: scale * multiplier * codes, from any layout."""

from __future__ import annotations

import torch

from ternc.config import MAX_IN_FEATURES
from ternc.errors import KernelError
from ternc.formats import layouts
from ternc.formats.quantized import Quantized, group_count
from ternc.runtime import dispatch
from ternc.runtime.ops.definition import (
    FLOAT_TYPES,
    OpDefinition,
    refuse_gradient,
    unreachable_backward,
)


def check_packed(
    op: str,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
) -> None:
    """Raise KernelError where the packed tensors do not hold a weight [N, K]."""
    order = layouts.get(layout)
    groups = group_count(in_features, group_size)
    if in_features > MAX_IN_FEATURES:
        raise KernelError(f"ternc::{op}: in_features={in_features} is over {MAX_IN_FEATURES:,}")
    if weight.dtype != torch.uint8 or weight.numel() != order.nbytes(out_features, in_features):
        raise KernelError(
            f"ternc::{op}: weight is {weight.dtype} {list(weight.shape)}; layout {order.name!r} of "
            f"[{out_features}, {in_features}] is uint8 "
            f"{list(order.weight_shape(out_features, in_features))}"
        )
    scales: list[tuple[int, ...]] = [(1,), (out_features,)]
    if group_size and multiplier is None:
        scales = [(out_features, groups)]
    if scale.dtype != torch.float32 or tuple(scale.shape) not in scales:
        raise KernelError(
            f"ternc::{op}: scale is {scale.dtype} {list(scale.shape)}, not float32 "
            + " or ".join(str(list(shape)) for shape in scales)
        )
    if multiplier is not None:
        wanted = order.multiplier_shape(out_features, groups)
        if multiplier.dtype != torch.uint8 or tuple(multiplier.shape) != wanted or not group_size:
            raise KernelError(
                f"ternc::{op}: multiplier is {multiplier.dtype} {list(multiplier.shape)}, "
                f"not uint8 {list(wanted)}, for group_size={group_size}"
            )


def unpack(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
) -> Quantized:
    """The op's packed arguments as numbers."""
    order = layouts.get(layout)
    return Quantized(
        codes=order.unpack(weight, out_features, in_features),
        scale=scale,
        multiplier=None
        if multiplier is None
        else order.unpack_multiplier(multiplier, out_features),
        group_size=group_size,
        planes=order.planes,
    )


def check_dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> None:
    """Raise KernelError for what no kernel takes."""
    if dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::dequantize: dtype {dtype}, not float32, bfloat16 or float16")
    check_packed(
        "dequantize", weight, scale, multiplier, out_features, in_features, group_size, layout
    )


def reference(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W [N, K] = scale * (multiplier * codes): one fp32 rounding, then one to dtype."""
    check_dequantize(
        weight, scale, multiplier, out_features, in_features, group_size, layout, dtype
    )
    dispatch.record(weight, "reference")
    quantized = unpack(weight, scale, multiplier, out_features, in_features, group_size, layout)
    return quantized.dequantize().to(dtype)


def fake(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_dequantize(
        weight, scale, multiplier, out_features, in_features, group_size, layout, dtype
    )
    return weight.new_empty((out_features, in_features), dtype=dtype)


DEQUANTIZE = OpDefinition(
    name="dequantize",
    schema="(Tensor weight, Tensor scale, Tensor? multiplier, int out_features, int in_features, "
    "int group_size, int layout, ScalarType dtype) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient("dequantize", "use ternc::linear, which differentiates scales"),
    backward=unreachable_backward,
)
