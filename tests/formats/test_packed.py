"""Packed weights: lossless both ways, sizes of real buffers, refusals."""

from __future__ import annotations

import pytest
import torch
from reference import CASES, random_quantized

from ternc.errors import WeightShapeError
from ternc.formats import layouts, pack, resident_layout, to_layout, unpack


def assert_same(left, right):
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scale, right.scale)
    assert (left.multiplier is None) == (right.multiplier is None)
    if left.multiplier is not None:
        assert torch.equal(left.multiplier, right.multiplier)
    assert (left.group_size, left.planes, left.exact) == (
        right.group_size,
        right.planes,
        right.exact,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_round_trip(case, device):
    quantized = random_quantized(*case)
    packed = pack(quantized, device)
    assert packed.layout == resident_layout(quantized.planes, device)
    assert_same(unpack(packed), quantized)
    assert_same(unpack(to_layout(to_layout(packed, quantized.planes), "cpu")), quantized)


def test_to_layout_keeps_a_weight_that_is_there():
    packed = pack(random_quantized(5, 20, 1), "cpu")
    assert to_layout(packed, "cpu") is packed


def test_bytes_are_those_of_the_buffers():
    packed = pack(random_quantized(130, 70, 2, 16), "cpu")
    assert packed.nbytes == packed.weight.nbytes + packed.scale.nbytes + packed.multiplier.nbytes
    assert packed.weight.nbytes == 5 * 18 * 64
    assert packed.multiplier.nbytes == 5 * 5 * 32


def test_one_plane_row_scales_at_rest(register_ops):
    w = torch.randn(512, 512)
    codes, scale, _ = torch.ops.ternc.fit(w, 1, 0, 0)
    quantized = random_quantized(512, 512, 1)
    quantized = type(quantized)(codes, scale, None, 0, 1)
    packed = pack(quantized, "cpu")
    stored = layouts.get(1).pack(codes).nbytes + 2 * 512
    assert packed.nbytes_at_rest == stored
    assert 8 * stored / w.numel() <= 1.65


def test_layout_of_other_planes_is_refused():
    with pytest.raises(WeightShapeError, match="layout 12 holds 2 planes, the weight 1"):
        pack(random_quantized(5, 20, 1), 12)


def test_group_size_that_a_layout_cannot_hold():
    quantized = random_quantized(5, 20, 1, 6)
    assert_same(unpack(pack(quantized, "cuda")), quantized)
    with pytest.raises(WeightShapeError, match="group_size=6 is not a multiple of 4"):
        pack(quantized, "cpu")
