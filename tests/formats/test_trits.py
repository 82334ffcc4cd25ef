"""Base-3 bytes: the documented digits, every code, damaged bytes refused."""

from __future__ import annotations

import pytest
import torch
from reference import ODD_SHAPES, random_codes

from ternc.config import CODE_MAX
from ternc.errors import CheckpointError
from ternc.formats import trits


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), ODD_SHAPES)
def test_round_trip(planes, rows, columns):
    codes = random_codes(rows, columns, planes)
    packed = trits.pack(codes, planes)
    assert packed.shape == (planes, rows, -(-columns // 5))
    trits.check_bytes(packed, "weight")
    assert torch.equal(trits.unpack(packed, columns), codes)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_planes_are_the_balanced_ternary_digits(planes):
    codes = torch.arange(-CODE_MAX[planes], CODE_MAX[planes] + 1, dtype=torch.int8)[:, None]
    digits = [trits.unpack(plane[None], 1) for plane in trits.pack(codes, planes)]
    assert all(digit.abs().max() == 1 for digit in digits)
    total = sum(3 ** (planes - 1 - p) * digit for p, digit in enumerate(digits))
    assert torch.equal(total.to(torch.int8), codes)


def test_byte_value():
    codes = torch.tensor([[1, -1, 0, 1, -1, 1, 0]], dtype=torch.int8)
    first = 2 + 0 * 3 + 1 * 9 + 2 * 27 + 0 * 81
    second = 2 + 1 * 3 + 1 * 9 + 1 * 27 + 1 * 81  # pad trits are 0, digit 1
    assert trits.pack(codes, 1).tolist() == [[[first, second]]]


@pytest.mark.parametrize("byte", range(243, 256))
def test_invalid_byte(byte):
    packed = trits.pack(random_codes(4, 20, 2), 2)
    packed[1, 2, 3] = byte
    with pytest.raises(CheckpointError, match=rf"layer\.weight: byte {byte} at \[1, 2, 3\]"):
        trits.check_bytes(packed, "layer.weight")
