"""Rules change no value but by quantisation: to 1e-5 in fp32, integers but for rare roundings."""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import ACTIVATIONS, Block, RMSNorm, ShiftedNorm
from torch import nn

import ternc
from ternc.config import Config
from ternc.runtime import ops

FLOATS = {"planes": 3, "activation_bits": None}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    ops.register()


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def run(model, *args, **options):
    fast = torch.compile(model, backend="ternc", options={"inner": "eager", **options})
    with torch.no_grad():
        return fast(*args), ternc.report(fast)


def dequantised(model, config):
    """The float model with the values that packing gives its weights."""
    model = copy.deepcopy(model)
    for name, module in ternc.quantize(model, config).named_modules():
        if isinstance(module, ternc.TernaryLinear):
            model.get_submodule(name).weight = nn.Parameter(module.weight)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [RMSNorm, ShiftedNorm, nn.LayerNorm])
def test_block_on_float_activations(norm, bias):
    """Products of one input (other row counts, with biases), residuals: the float block itself."""
    block, x = Block(norm, bias=bias).eval(), torch.randn(2, 5, 64)
    y, report = run(block, x, **FLOATS)
    assert sum("input shared" in row.pattern for row in report.rewritten) == 5
    assert sum("residual" in row.pattern for row in report.rewritten) == 2
    with torch.no_grad():
        expected = dequantised(block, Config(method="rtn", **FLOATS))(x)
    assert relative(y, expected) < 1e-5


def test_products_of_one_input_with_scales_of_their_own():
    """One weight ternary by value with one scale, one with a scale a row, one fitted in groups."""
    block, x = Block(bias=True).eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        block.q.weight.copy_(torch.randint(-1, 2, (64, 64)) * 0.37)
        block.k.weight.copy_(torch.randint(-1, 2, (32, 64)) * torch.rand(32, 1))
    y, report = run(block, x, group_size=16, **FLOATS)
    shared = {row.name: row for row in report.rewritten if row.name in "qkv"}
    assert all("input shared" in row.pattern for row in shared.values())
    assert shared["q"].weight_error == shared["k"].weight_error == 0.0 < shared["v"].weight_error
    with torch.no_grad():
        config = Config(method="rtn", group_size=16, **FLOATS)
        assert relative(y, dequantised(block, config)(x)) < 1e-5


class BeforeIdentity(nn.Module):
    """function(x), then a product with the identity: what the product was given."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.identity = nn.Linear(64, 64, bias=False)
        self.identity.weight = nn.Parameter(torch.eye(64))

    def forward(self, x):
        h = self.function(x)
        return self.identity(h), h


@pytest.mark.parametrize("norm", [RMSNorm, ShiftedNorm, nn.LayerNorm, nn.RMSNorm])
def test_norm_keeps_its_values(norm):
    model, x = BeforeIdentity(norm(64)).eval(), torch.randn(100, 64)
    (y, kept), report = run(model, x)
    assert report.rewritten[0].pattern.endswith("norm + linear")
    with torch.no_grad():
        expected = model(x)[1]
    assert relative(kept, expected) < 1e-5
    assert_same_integers(y, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_keeps_its_values(name):
    model, x = BeforeIdentity(ACTIVATIONS[name]).eval(), torch.randn(100, 64) * 3
    model.forward = lambda x: model.identity(model.function(x))
    y, report = run(model, x)
    assert report.rewritten[0].pattern == f"{name} + linear"
    assert_same_integers(y, ACTIVATIONS[name](x))


def assert_same_integers(y, h):
    """y is h quantised: a last bit before the rounding may move 1 in 1,000 by one step."""
    expected = torch.ops.ternc.fake_quantize_act(h, 8)
    wrong = (y - expected).abs() > 1e-5 * expected.abs().amax(-1, keepdim=True)
    assert wrong.float().mean() <= 1e-3
    assert ((y - expected).abs() <= h.abs().amax(-1, keepdim=True) / 127 * 1.01).all()
