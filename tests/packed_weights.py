"""Random packed weights on the GPU."""

from __future__ import annotations

import torch
from reference import random_quantized

from ternc.formats import Packed, Quantized, pack


def packed_on_gpu(
    rows: int, columns: int, planes: int, group_size: int = 0, scales: str = "row"
) -> Packed:
    """A random weight in the CUDA layout."""
    return pack(to_gpu(random_quantized(rows, columns, planes, group_size, scales)), "cuda")


def to_gpu(quantized: Quantized) -> Quantized:
    multiplier = quantized.multiplier
    return Quantized(
        codes=quantized.codes.cuda(),
        scale=quantized.scale.cuda(),
        multiplier=None if multiplier is None else multiplier.cuda(),
        group_size=quantized.group_size,
        planes=quantized.planes,
    )


def assert_same(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, NaN where NaN is expected."""
    assert output.dtype == expected.dtype
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(), expected.nan_to_num())
