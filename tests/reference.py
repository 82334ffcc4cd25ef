"""What tests measure kernels and formats against."""

from __future__ import annotations

import torch

from ternc.config import LARGEST_CODE
from ternc.formats import Packed, Quantized, pack
from ternc.formats.quantized import group_count

ODD_SHAPES = [(1, 1), (1, 127), (3, 4), (65, 130), (129, 7), (130, 129)]
"""(N, K) around the borders of blocks, k-steps and bytes."""


def assert_as_good_as(
    output: torch.Tensor, low_precision: torch.Tensor, exact: torch.Tensor, atol: float = 1e-6
) -> None:
    """`output` is at most twice as far from `exact` (float64) as torch's own `low_precision` is."""
    own = (low_precision.double() - exact).abs().max().item()
    error = (output.double() - exact).abs().max().item()
    assert error <= 2 * own + atol, f"error {error:.3g}, torch's own {own:.3g}"


def spread_out(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in every other place of memory."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def random_codes(rows: int, columns: int, planes: int) -> torch.Tensor:
    """int8 [rows, columns], uniform over every code of `planes` planes, or of INT8."""
    most = LARGEST_CODE[planes]
    return torch.randint(-most, most + 1, (rows, columns), dtype=torch.int8)


def random_quantized(
    rows: int, columns: int, planes: int, group_size: int = 0, scales: str = "row"
) -> Quantized:
    """Random codes with scales per "row", "tensor", "free" (by group) or "planes" (by group and
    plane), tied multipliers else.
    """
    groups = group_count(columns, group_size)
    shape = {
        "row": (rows,), "tensor": (1,), "free": (rows, groups), "planes": (rows, groups, planes)
    }[scales]  # fmt: skip
    multiplier = None
    if group_size and scales not in ("free", "planes"):
        most = 127 // LARGEST_CODE[planes]
        multiplier = torch.randint(1, most + 1, (rows, groups), dtype=torch.uint8)
    return Quantized(
        codes=random_codes(rows, columns, planes),
        scale=torch.rand(shape) * 0.1 + 0.01,
        multiplier=multiplier,
        group_size=group_size,
        planes=planes,
    )


def token_arguments(
    x: torch.Tensor, weights: list[Packed], kind: str, activation: str, bias: bool = True
) -> tuple:
    """Arguments of ternc::token_linears1..4, with a norm of random gain where `kind` says so."""
    none = x.new_empty(0)
    gain, shift = torch.randn(2, x.shape[-1], device=x.device)
    return (
        x,
        gain if kind else None,
        shift.to(x.dtype) if kind == "layer" else None,
        kind,
        1e-5,
        0.5,
        kind == "rms",
        activation,
        [packed.weight for packed in weights],
        [packed.scale for packed in weights],
        [none if packed.multiplier is None else packed.multiplier for packed in weights],
        [x.new_ones(packed.shape[0]) if bias else none for packed in weights],
        [packed.shape[0] for packed in weights],
        [packed.group_size for packed in weights],
        [packed.layout for packed in weights],
    )


def linear_arguments(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, activation_bits: int = 8
) -> tuple:
    """Arguments of ternc::linear."""
    return (
        x,
        packed.weight,
        packed.scale,
        packed.multiplier,
        bias,
        packed.shape[0],
        packed.group_size,
        activation_bits,
        packed.layout,
    )


def dequantize_arguments(packed: Packed, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of ternc::dequantize."""
    tensors = (packed.weight, packed.scale, packed.multiplier)
    return (*tensors, *packed.shape, packed.group_size, packed.layout, dtype)


CASES = [
    # (N, K, planes, group_size, scales)
    (5, 33, 1, 0, "row"),
    (130, 64, 1, 16, "row"),
    (7, 40, 2, 0, "tensor"),
    (40, 100, 2, 32, "row"),
    (3, 130, 3, 128, "row"),
    (129, 36, 3, 0, "row"),
    (9, 50, 1, 16, "free"),
    (6, 24, 3, 8, "free"),
]
"""Weights that together reach every plane count, scale kind, and short last groups."""


def packed_case(case: tuple, target: str | int = "cpu") -> Packed:
    """A random packed weight of `CASES`."""
    return pack(random_quantized(*case), target)
