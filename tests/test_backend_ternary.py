"""Weights that are ternary by value are found however they are written, and lowered exactly."""

from __future__ import annotations

import pytest
import torch
from bitlinears import SPELLINGS, Detach, absmean
from torch import nn

import ternc
from ternc.runtime import ops

INNER = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, layer, dtype=torch.float32):
        super().__init__()
        self.first = layer(96, 64)
        self.second = layer(64, 32, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", SPELLINGS, ids=lambda layer: layer.__name__)
def test_every_spelling_is_lowered_to_one_plane(layer, dtype):
    torch.manual_seed(1)
    model = Model(layer, dtype).eval()
    x = torch.randn(5, 96, dtype=dtype)
    fast = torch.compile(model, backend="ternc", options=INNER)
    with torch.no_grad():
        expected, actual = model(x), fast(x)
    report = ternc.report(fast)
    assert [row.action for row in report.rows] == ["rewritten"] * 2
    assert [row.name for row in report.rows] == ["first", "second"]
    assert all("x1" in row.format and row.weight_error == 0 for row in report.rows)
    # int8 activations are all that may differ (bf16: its own roundings too)
    error = (actual - expected).float().norm() / expected.float().norm()
    assert error < (0.02 if dtype is torch.float32 else 0.04)


@pytest.mark.parametrize("layer", [Detach], ids=lambda layer: layer.__name__)
def test_own_activation_quantiser_is_absorbed(layer):
    model = Model(layer).eval()
    x = torch.randn(5, 96)
    fast = torch.compile(model, backend="ternc", options=INNER)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert {row.pattern for row in ternc.report(fast).rows} == {"activation quantiser + linear"}


def test_integer_sums_are_exact():
    """With scale 1, no bias and integer rows whose largest is 127, the output is the integer
    sum.
    """
    trits = torch.randint(-1, 2, (70, 131)).float()
    linear = nn.Linear(131, 70, bias=False)
    linear.weight = nn.Parameter(trits)
    x = torch.randint(-127, 128, (9, 131)).float()
    x[:, 0] = 127.0
    model = nn.Sequential(linear)
    fast = torch.compile(model, backend="ternc", options=INNER)
    with torch.no_grad():
        assert torch.equal(fast(x), (x.double() @ trits.double().T).float())
    assert ternc.report(fast).rows[0].weight_error == 0


def test_one_element_off_is_not_exact_and_says_why():
    ops.register()
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.copy_(absmean(linear.weight))
        linear.weight[3, 17] = 1.5 * linear.weight.abs().max()
    model = nn.Sequential(linear)
    fast = torch.compile(model, backend="ternc", options={**INNER, "planes": 1})
    with torch.no_grad():
        fast(torch.randn(2, 64))
    row = ternc.report(fast).rows[0]
    assert row.weight_error > 0
    assert "[3, 17]" in row.reason and "not exactly ternary" in row.reason


def test_float_weights_over_budget_stay_float():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    x = torch.randn(3, 64)
    fast = torch.compile(model, backend="ternc", options={**INNER, "error_budget": 0.001})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    row = ternc.report(fast).rows[0]
    assert row.action == "skipped" and "error_budget" in row.reason


def test_small_layers_that_would_grow_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 5)).eval()
    x = torch.randn(3, 64)
    fast = torch.compile(model, backend="ternc", options=INNER)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert "not be smaller" in ternc.report(fast).rows[0].reason
    assert "not be smaller" in ternc.report(ternc.quantize(model)).rows[0].reason
    asked = torch.compile(model, backend="ternc", options={**INNER, "planes": 2})
    with torch.no_grad():
        asked(x)
    assert ternc.report(asked).rows[-1].action == "rewritten"  # a plane count is obeyed
