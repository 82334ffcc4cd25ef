"""Ternary by value: found exactly, whatever the unit; refused where one element is off."""

from __future__ import annotations

import re

import pytest
import torch

from ternc.formats import Refusal, detect_ternary

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def trits(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns)).float()


def grouped(rows: int, columns: int, size: int) -> torch.Tensor:
    scales = torch.rand(rows, -(-columns // size)) + 0.1
    return trits(rows, columns) * scales.repeat_interleave(size, 1)[:, :columns]


UNITS = {
    "tensor": (lambda: trits(24, 96) * 0.0213, "ternary x1 tensor"),
    "row": (lambda: trits(24, 96) * (torch.rand(24, 1) + 0.1), "ternary x1 row"),
    "group 32": (lambda: grouped(24, 96, 32), "ternary x1 g32"),
    "group 48": (lambda: grouped(24, 96, 48), "ternary x1 g48"),
    "short last group": (lambda: grouped(24, 150, 64), "ternary x1 g64"),
    "single row": (lambda: trits(1, 50) * 0.3, "ternary x1 row"),
}


@DTYPES
@pytest.mark.parametrize("unit", UNITS)
def test_found_and_exact(unit, dtype):
    make, name = UNITS[unit]
    w = make().to(dtype)
    found = detect_ternary(w)
    assert found.describe() == name
    assert (found.exact, found.planes, found.multiplier) == (True, 1, None)
    assert torch.equal(found.dequantize(), w.float())


def test_configured_group_size_is_tried():
    w = grouped(16, 130, 40)
    assert isinstance(detect_ternary(w), Refusal)
    assert detect_ternary(w, 40).group_size == 40


def test_float64_magnitudes_are_rounded_to_float32():
    w = trits(8, 32).double() * 0.1
    assert torch.equal(detect_ternary(w).dequantize(), w.float())


def test_gradient_is_not_needed():
    w = (trits(8, 32) * 0.5).requires_grad_()
    assert not detect_ternary(w).scale.requires_grad


@pytest.mark.parametrize(
    ("unit", "where"),
    [
        ("tensor", r"the other elements have \+-0\.0213"),
        ("row", r"row 3 has \+-"),
        ("group 32", r"columns 0 to 31 of row 3 have \+-"),
        ("short last group", r"columns 0 to 63 of row 3 have \+-"),
    ],
)
def test_one_element_off(unit, where):
    w = UNITS[unit][0]()
    w[3, 17] = -0.21
    refusal = detect_ternary(w)
    assert isinstance(refusal, Refusal)
    assert refusal.near_ternary
    pattern = (
        rf"not exactly ternary: 1 of {w.numel():,} elements differs; "
        r"element \[3, 17\] = -0\.21 where "
    )
    assert re.search(pattern + where, refusal.reason), refusal.reason


def test_one_element_off_by_one_bit():
    w = trits(64, 64) * 0.2
    w[40, 5] = torch.nextafter(torch.tensor(0.2), torch.tensor(1.0))
    assert "element [40, 5] = 0.200000018 where" in detect_ternary(w).reason
    assert "+-0.200000003" in detect_ternary(w).reason


def test_several_elements_off_are_counted():
    w = trits(64, 64) * 0.2
    w[10, :3] = 0.3
    assert "3 of 4,096 elements differ; element [10, 0] = 0.3" in detect_ternary(w).reason


@DTYPES
def test_float_weight_is_refused(dtype):
    refusal = detect_ternary(torch.randn(64, 128).to(dtype))
    assert not refusal.near_ternary
    assert refusal.reason.startswith("not ternary: the 128 nonzero elements of row 0 have")


def test_all_zero():
    found = detect_ternary(torch.zeros(8, 32))
    assert found.describe() == "ternary x1 tensor"
    assert not found.codes.any()
    assert found.scale.tolist() == [0.0]


def test_zero_rows_among_others():
    w = trits(8, 32) * torch.arange(8)[:, None]
    found = detect_ternary(w)
    assert found.describe() == "ternary x1 row"
    assert torch.equal(found.dequantize(), w)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(value):
    w = trits(8, 32)
    w[2, 5] = value
    assert f"1 elements are not finite; the first is [2, 5] = {value}" in detect_ternary(w).reason


@pytest.mark.parametrize(
    "w", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 4, dtype=torch.int8)]
)
def test_not_a_matrix_of_floats(w):
    assert "not a floating-point matrix" in detect_ternary(w).reason
