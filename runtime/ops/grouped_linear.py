"""grouped_linear(x, offsets, W) -> rows of x times the weight of their expert.

Rows offsets[e - 1] .. offsets[e] of x (sorted by expert) meet expert e of a stack of packed
weights: what a mixture of experts computes. The input may already be integers (q, sx).
"""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.formats import dense, layouts
from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize, linears
from ternc.runtime.ops.definition import (
    OpDefinition,
    refuse_gradient,
    unreachable_backward,
)

PADDED_ROWS = 128
"""Rows of every expert are padded to a multiple of this: no block of any layout has two experts."""


def check_grouped_linear(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    experts: int,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> None:
    """Raise KernelError for what no kernel takes."""
    linears.check_input("grouped_linear", x, sx, activation_bits, dtype)
    if x.dim() < 2:
        raise KernelError(f"ternc::grouped_linear: x is {list(x.shape)}, not [..., K]")
    if offsets is not None and (offsets.dtype != torch.int32 or tuple(offsets.shape) != (experts,)):
        raise KernelError(
            f"ternc::grouped_linear: offsets are {offsets.dtype} {list(offsets.shape)}, not int32 "
            f"[{experts}]"
        )
    if layout == dense.NUMBER:
        raise KernelError(
            f"ternc::grouped_linear: layout {layout} (dense) has blocks of 80 rows, which hold "
            "parts of two experts; pack the stack as layout 11"
        )
    dequantize.check_packed(
        "grouped_linear",
        weight,
        scale,
        multiplier,
        experts * padded_rows(out_features),
        x.shape[-1],
        group_size,
        layout,
    )


def padded_rows(out_features: int) -> int:
    """Rows that one expert takes in the stack."""
    return -(-out_features // PADDED_ROWS) * PADDED_ROWS


def grouped_linear(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    experts: int,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [..., K], its M rows sorted by expert, offsets int32 [E] (ends of the experts' rows; None:
    M / E rows each) -> [..., N] in `dtype`.

    One product an expert that has rows, on its slice of the stack; rows past the last offset are
    zero.

    sx: None, and x is floating point; or fp32 [..., 1], and x holds the integers q.
    """
    numbers = (experts, out_features, group_size, activation_bits, layout, dtype)
    check_grouped_linear(x, sx, offsets, weight, scale, multiplier, *numbers)
    flat, steps = x.flatten(0, -2), None if sx is None else sx.flatten(0, -2)
    y = x.new_zeros((flat.shape[0], out_features), dtype=dtype)
    rows = padded_rows(out_features)
    begin = 0
    for expert, end in enumerate(ends_of(offsets, flat.shape[0], experts)):
        if end > begin:
            part = _expert(weight, scale, multiplier, expert, experts, rows, layout)
            product = torch.ops.ternc.linears1(
                flat[begin:end],
                None if steps is None else steps[begin:end],
                *part,
                None,
                None,
                rows,
                group_size,
                activation_bits,
                layout,
                dtype,
            )
            y[begin:end] = product[:, :out_features]
            dispatch.record(weight, dispatch.last_kernel(part[0]) or "reference")
        begin = max(begin, end)
    return y.view(*x.shape[:-1], out_features)


def ends_of(offsets: torch.Tensor | None, rows: int, experts: int) -> list[int]:
    """Where the rows of every expert end."""
    if offsets is not None:
        return offsets.tolist()
    return [rows // experts * (expert + 1) for expert in range(experts)]


def _expert(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    expert: int,
    experts: int,
    rows: int,
    layout: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed tensors of one expert: views of the stack, which are contiguous in every layout."""
    order = layouts.get(layout)
    dim = order.row_dim
    blocks = weight.shape[dim] // experts
    part = weight.narrow(dim, expert * blocks, blocks)
    if scale.shape[0] != 1 or scale.dim() == 2:
        scale = scale.narrow(0, expert * rows, rows)
    if multiplier is not None:
        count = multiplier.shape[0] // experts
        multiplier = multiplier.narrow(0, expert * count, count)
    return part, scale, multiplier


def fake(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    offsets: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    experts: int,
    out_features: int,
    group_size: int,
    activation_bits: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    numbers = (experts, out_features, group_size, activation_bits, layout, dtype)
    check_grouped_linear(x, sx, offsets, weight, scale, multiplier, *numbers)
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


GROUPED_LINEAR = OpDefinition(
    name="grouped_linear",
    schema="(Tensor x, Tensor? sx, Tensor? offsets, Tensor weight, Tensor scale, "
    "Tensor? multiplier, int experts, int out_features, int group_size, int activation_bits, "
    "int layout, ScalarType dtype) -> Tensor",
    reference=grouped_linear,
    fake=fake,
    setup_context=refuse_gradient("grouped_linear", "train the experts in floating point"),
    backward=unreachable_backward,
)
