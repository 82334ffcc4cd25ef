"""Layouts: bytes as documented, lossless round trips, sizes."""

from __future__ import annotations

import pytest
import torch
from reference import ODD_SHAPES, random_codes, random_quantized

from ternc.errors import KernelError
from ternc.formats import layouts, pack, resident_layout

ALL = pytest.mark.parametrize("layout", layouts.ALL.values(), ids=lambda layout: layout.name)


@ALL
@pytest.mark.parametrize(("rows", "columns"), ODD_SHAPES)
def test_round_trip(layout, rows, columns):
    codes = random_codes(rows, columns, layout.planes)
    weight = layout.pack(codes)
    assert weight.dtype == torch.uint8
    assert weight.shape == layout.weight_shape(rows, columns)
    assert weight.is_contiguous()
    assert weight.nbytes == layout.nbytes(rows, columns)
    assert torch.equal(layout.unpack(weight, rows, columns), codes)


@ALL
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (33, 5), (128, 2), (129, 3)])
def test_multiplier_round_trip(layout, rows, groups):
    multiplier = torch.randint(0, 128, (rows, groups), dtype=torch.uint8)
    packed = layout.pack_multiplier(multiplier)
    assert packed.shape == layout.multiplier_shape(rows, groups)
    assert torch.equal(layout.unpack_multiplier(packed, rows), multiplier)


@ALL
@pytest.mark.parametrize(("rows", "columns"), [(70, 20), (256, 512)])
def test_non_contiguous_codes(layout, rows, columns):
    codes = random_codes(columns, rows, layout.planes).T
    assert torch.equal(layout.unpack(layout.pack(codes), rows, columns), codes)


def test_lanes_one_plane_bytes():
    codes = random_codes(70, 10, 1)
    weight = layouts.get(11).pack(codes)
    for row, column in [(0, 0), (17, 3), (63, 9), (64, 4), (69, 8)]:
        block, field, lane = row // 64, row % 64 // 16, row % 16
        byte = int(weight[block, column // 4, 4 * lane + column % 4])
        assert (byte >> (2 * field) & 3) - 1 == codes[row, column]


def test_lanes_two_planes_bytes():
    codes = random_codes(40, 10, 2)
    weight = layouts.get(12).pack(codes)
    for row, column in [(0, 0), (17, 3), (31, 9), (32, 4), (39, 8)]:
        block, field, lane = row // 32, row % 32 // 16, row % 16
        byte = int(weight[block, column // 4, 4 * lane + column % 4])
        assert (byte >> (4 * field) & 15) - 4 == codes[row, column]


def test_lanes_three_planes_bytes():
    codes = random_codes(140, 10, 3)
    weight = layouts.get(13).pack(codes)
    for row, column in [(0, 0), (17, 3), (100, 9), (127, 5), (128, 4), (139, 8)]:
        block, vector, lane = row // 128, row % 128 // 32, row % 16
        step, place = column // 4, 4 * lane + column % 4
        low = int(weight[block, step, 64 * vector + place]) >> (4 * (row % 32 // 16)) & 15
        fifth = int(weight[block, step, 256 + place]) >> (row % 128 // 16) & 1
        assert low + 16 * fifth - 13 == codes[row, column]


@pytest.mark.parametrize("number", [11, 12, 13])
def test_lanes_pad_with_code_zero(number):
    layout = layouts.get(number)
    weight = layout.pack(random_codes(1, 1, layout.planes))
    padded = layout.unpack(weight, layout.block, 4)
    padded[0, 0] = 0
    assert not padded.any()


def test_lanes_multiplier_order():
    multiplier = torch.randint(0, 32, (40, 3), dtype=torch.uint8)
    packed = layouts.get(12).pack_multiplier(multiplier)
    assert packed.shape == (2, 3, 32)
    assert torch.equal(packed[1, 2, :8], multiplier[32:, 2])
    assert not packed[1, :, 8:].any()


@pytest.mark.parametrize(
    ("row", "column"), [(0, 0), (1, 63), (2, 64), (0, 200), (1, 256), (2, 299)]
)
def test_p256_bytes(row, column):
    chunk, field, k = column // 256, column % 256 // 64, column % 64
    codes = {planes: random_codes(3, 300, planes) for planes in (1, 2, 3)}
    weights = {planes: layouts.get(20 + planes).pack(codes[planes])[row, chunk] for planes in codes}
    assert int(weights[1][k]) >> (2 * field) & 3 == int(codes[1][row, column]) % 4
    place, nibble = 64 * (field // 2) + k, 4 * (field % 2)
    assert int(weights[2][place]) >> nibble & 15 == int(codes[2][row, column]) % 16
    high = int(weights[3][place]) >> nibble & 15
    lowest = int(weights[3][128 + k % 32]) >> (2 * field + k // 32) & 1
    assert 2 * high + lowest == int(codes[3][row, column]) % 32


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_resident_layout(planes):
    assert resident_layout(planes, "cpu") == 10 + planes
    assert resident_layout(planes, "cuda") == 20 + planes
    assert resident_layout(planes, "meta") == planes


@pytest.fixture
def dense_from_1000():
    before = layouts._dense_from
    layouts.prefer_dense(1000)
    yield
    layouts.prefer_dense(before)


def test_large_weights_of_one_plane_are_dense_where_that_is_faster(dense_from_1000):
    assert resident_layout(1, "cpu", 1000) == 14
    assert resident_layout(1, "cpu", 999) == 11
    assert resident_layout(1, "cpu") == 11
    assert resident_layout(2, "cpu", 1000) == 12
    assert resident_layout(1, "cuda", 1000) == 21
    assert pack(random_quantized(10, 100, 1), "cpu").layout == 14
    assert pack(random_quantized(10, 100, 1, 20, "free"), "cpu").layout == 11


def test_dense_bytes():
    codes = torch.zeros(80, 4, dtype=torch.int8)
    codes[[0, 16, 32, 48, 64], 0] = torch.tensor([1, -1, 0, -1, 1], dtype=torch.int8)
    codes[[1, 17, 33, 49, 65], 1] = 1
    weight = layouts.get(14).pack(codes)
    assert weight.shape == (1, 1, 64)
    assert weight[0, 0, 0] == 64 * 2 + 2 + 0 + 9 * 1 + 0  # four digits below 64: the fifth on top
    assert weight[0, 0, 4 + 1] == 192 + 17 * 2 + 80 - 64
    assert weight[0, 0, 63] == 64 * 1 + 40  # five zeros
    weight[0, 0, 63] = 250  # stands for nothing: five zeros too
    assert torch.equal(layouts.get(14).unpack(weight, 80, 4), codes)


def test_unknown_layout():
    with pytest.raises(KernelError, match="layout 99 is not known; known are"):
        layouts.get(99)


@ALL
def test_at_most_two_bits_a_trit(layout):
    assert layout.nbytes(1024, 1280) * 8 <= 2 * layout.planes * 1024 * 1280
