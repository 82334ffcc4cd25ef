"""Rules of one token: where they fire, where they must not, and that the result stays the same."""

from __future__ import annotations

import pytest
import torch
from blocks import Block
from torch import nn

import ternc
from ternc.backend import rewrite
from ternc.config import Config
from ternc.runtime import ops

WIDTH = 64


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    ops.register()


def rewritten(module, *args, unpacked=False):
    """Output of the rewritten graph (of the given one where it takes packed weights), how often the
    rewritten one has which ternary op."""
    found = []

    def backend(gm, inputs):
        graph, _ = rewrite(gm, inputs, Config())
        overloads = (node.target for node in graph.graph.nodes)
        ternary = [op for op in overloads if getattr(op, "namespace", "") == "ternc"]
        found.extend(op.name().removeprefix("ternc::") for op in ternary)
        return gm.forward if unpacked else graph.forward

    with torch.no_grad():
        y = torch.compile(module, backend=backend)(*args)
    return y, {name: found.count(name) for name in found}


def packed(module, **settings):
    return ternc.quantize(module.eval(), ternc.Config(planes=1, method="rtn", **settings))


def assert_close(y, expected):
    assert (y - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_block_of_one_token(norm):
    block = packed(Block(norm), rotation="none")
    x = torch.randn(1, 1, WIDTH)
    y, names = rewritten(block, x)
    wanted = {"token_linears3": 1, "attention": 1, "token_linears1": 1, "linears1": 2}
    assert names == wanted, names
    assert_close(y, block(x))


def test_several_tokens_stay_as_they_are():
    block = packed(Block(nn.RMSNorm), rotation="none")
    _, names = rewritten(block, torch.randn(2, 1, WIDTH))
    assert "norm_quantize" in names and not any("token" in name for name in names)


def test_weights_of_the_backend_stay_as_they_are():
    """A graph whose weights may change runs op by op after a change: its ops stay separate."""
    _, names = rewritten(Block(nn.RMSNorm).eval(), torch.randn(1, 1, WIDTH), unpacked=True)
    assert "norm_quantize" in names and not any("token" in name for name in names)


def test_rotated_inputs_stay_as_they_are():
    block = packed(Block(nn.RMSNorm), rotation="hadamard")
    x = torch.randn(1, 1, WIDTH)
    y, names = rewritten(block, x)
    assert "activate_quantize" in names and "token_linears3" not in names
    assert_close(y, block(x))


class Branches(nn.Module):
    """A norm that is read twice, a gate that is read twice, or neither."""

    def __init__(self, norm_twice=False, gate_twice=False, first="gate"):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 96) for _ in range(2))
        self.down = nn.Linear(96, WIDTH)
        self.norm_twice, self.gate_twice, self.first = norm_twice, gate_twice, first

    def forward(self, x):
        h = self.norm(x)
        if self.first == "up":
            up, gate = self.up_proj(h), self.gate_proj(h)
        else:
            gate, up = self.gate_proj(h), self.up_proj(h)
        y = self.down(nn.functional.silu(gate) * up)
        if self.norm_twice:
            y = y + h
        return (y, gate) if self.gate_twice else y


def test_gate_and_up_in_one_launch():
    model = packed(Branches(), exclude=())
    x = torch.randn(1, WIDTH)
    y, names = rewritten(model, x)
    assert names == {"token_linears1": 1, "linears1": 1}, names
    assert_close(y, model(x))


def test_up_before_gate():
    """The activation is that of the first weight: an op of its own takes the other order."""
    model = packed(Branches(first="up"), exclude=())
    x = torch.randn(1, WIDTH)
    y, names = rewritten(model, x)
    assert names == {"token_linears2": 1, "activate_quantize": 1, "linears1": 1}, names
    assert_close(y, model(x))


def test_norm_read_twice():
    model = packed(Branches(norm_twice=True), exclude=())
    x = torch.randn(1, WIDTH)
    y, names = rewritten(model, x)
    assert "norm_quantize" in names and not any("token" in name for name in names)
    assert_close(y, model(x))


def test_gate_read_twice():
    model = packed(Branches(gate_twice=True), exclude=())
    x = torch.randn(1, WIDTH)
    (y, gate), names = rewritten(model, x)
    assert names == {"token_linears2": 1, "activate_quantize": 1, "linears1": 1}, names
    expected, expected_gate = model(x)
    assert_close(y, expected)
    assert_close(gate, expected_gate)


class Plain(nn.Module):
    """A block without a gate, its activation function once or twice."""

    def __init__(self, times=1):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc, self.proj = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.times = times

    def forward(self, x):
        h = self.fc(self.norm(x))
        for _ in range(self.times):
            h = nn.functional.gelu(h)
        return x + self.proj(h)


@pytest.mark.parametrize("times", [1, 2])
def test_an_activation_without_a_gate(times):
    """The product takes one activation function; a second one is an op of its own."""
    model = packed(Plain(times), exclude=())
    x = torch.randn(1, WIDTH)
    y, names = rewritten(model, x)
    alone = {} if times == 1 else {"activate_quantize": 1}
    assert names == {"token_linears1": 1, "linears1": 1, **alone}, names
    assert_close(y, model(x))


def test_one_block_behind_the_other():
    """The first block's output is replaced before the second block's product is read."""
    model = packed(nn.Sequential(Plain(), Plain(), Branches(), Plain()), exclude=())
    x = torch.randn(1, WIDTH)
    y, names = rewritten(model, x)
    assert names == {"token_linears1": 4, "linears1": 4}, names
    assert_close(y, model(x))
