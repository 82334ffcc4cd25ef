"""Quantized weights: values, errors, names, and tensors that do not fit together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import CASES, random_quantized

from ternc.errors import WeightShapeError
from ternc.formats.quantized import Quantized, check_multiplier


@pytest.mark.parametrize("case", CASES)
def test_dequantize_is_the_written_formula(case):
    quantized = random_quantized(*case)
    w = quantized.dequantize()
    assert w.dtype == torch.float32
    for n, k in [(0, 0), (quantized.shape[0] - 1, quantized.shape[1] - 1), (2, 17)]:
        group = k // quantized.group_size if quantized.group_size else 0
        value = quantized.codes[n, k].float()
        if quantized.multiplier is not None:
            value = value * quantized.multiplier[n, group].float()
        if quantized.free_scales:
            value = value * quantized.scale[n, group]
        else:
            value = value * quantized.scale.expand(quantized.shape[0])[n]
        assert w[n, k] == value


def test_relative_error():
    quantized = random_quantized(8, 20, 2)
    w = quantized.dequantize()
    assert quantized.relative_error(w) == 0.0
    assert quantized.relative_error(2 * w) == pytest.approx(0.5)
    zeros = Quantized(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2), None, 0, 1)
    assert zeros.relative_error(torch.zeros(2, 3)) == 0.0


@pytest.mark.parametrize("size", [2.0**-130, 2.0**-70, 2.0**70, 2.0**118])
def test_relative_error_where_squares_leave_fp32(size):
    torch.manual_seed(0)
    w = torch.randn(8, 20)
    codes = w.round().clamp(-1, 1).to(torch.int8)
    expected = float((w - codes).norm() / w.norm())
    quantized = Quantized(codes, torch.full((8,), size), None, 0, 1)
    for scaled in (w * size, w.double() * size):
        given = scaled.clone()
        assert quantized.relative_error(scaled) == pytest.approx(expected, rel=1e-3)
        assert torch.equal(scaled, given)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ((5, 20, 1), "ternary x1 row"),
        ((5, 20, 2, 0, "tensor"), "ternary x2 tensor"),
        ((5, 20, 3, 8), "ternary x3 g8"),
        ((5, 20, 1, 8, "free"), "ternary x1 g8"),
    ],
)
def test_describe(case, name):
    assert random_quantized(*case).describe() == name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codes", torch.zeros(4, 8), "codes are torch.float32, not int8"),
        ("codes", torch.zeros(8, dtype=torch.int8), "not \\[N, K\\]"),
        ("scale", torch.zeros(3), "scale has shape \\[3\\]"),
        ("scale", torch.zeros(4, dtype=torch.float16), "not float32"),
        ("planes", 4, "planes=4"),
        ("multiplier", torch.zeros(4, 3, dtype=torch.uint8), "multiplier \\[4, 3\\]"),
        ("multiplier", torch.zeros(4, 2), "multiplier is not uint8"),
    ],
)
def test_tensors_that_do_not_fit(field, value, message):
    with pytest.raises(WeightShapeError, match=message):
        dataclasses.replace(random_quantized(4, 8, 1, 4), **{field: value})


def test_multiplier_bound():
    quantized = random_quantized(4, 8, 3, 4)
    check_multiplier(quantized)
    quantized.multiplier[2, 1] = 10
    with pytest.raises(WeightShapeError, match="multiplier 10 is over 9"):
        check_multiplier(quantized)
