"""Fusion rules: where they fire, where they must not, and that the result stays the same."""

from __future__ import annotations

import pytest
import torch
from blocks import ACTIVATIONS, Block, RMSNorm, ShiftedNorm
from graphs import targets
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.backend import rewrite
from ternc.config import Config
from ternc.runtime import ops

CONFIG = Config(planes=3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    ops.register()


def rewritten(module, *args, config=CONFIG):
    """Output of the rewritten graph run eagerly, names of its ternary ops, its context."""
    found = {}

    def backend(gm, inputs):
        graph, context = rewrite(gm, inputs, config)
        found["ops"] = [name for name in targets(graph) if "ternc" in str(name) or "." in str(name)]
        found["context"] = context
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(*args)
    torch._dynamo.reset()
    fast = torch.compile(module, backend="ternc", options={"inner": "eager", "planes": 3})
    with torch.no_grad():
        return fast(*args), found["ops"], found["context"]


def count(names, op):
    return sum(op in str(name) for name in names)


def relative(actual, expected):
    return float((actual - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [RMSNorm, ShiftedNorm, nn.LayerNorm, nn.RMSNorm])
def test_decoder_block_is_four_products(norm, dtype):
    block = Block(norm).eval().to(dtype)
    x = torch.randn(2, 5, 64, dtype=dtype)
    y, names, _ = rewritten(block, x)
    assert count(names, "linears") == 4 and count(names, "linear.") == 0
    assert count(names, "norm_quantize") == 2 and count(names, "activate_quantize") == 1
    unfused = ternc.quantize(block, ternc.Config(planes=3, method="rtn"))
    with torch.no_grad():
        assert relative(y, unfused(x)) < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_known_by_its_values(name):
    block = Block(activation=ACTIVATIONS[name]).eval()
    y, names, context = rewritten(block, torch.randn(2, 5, 64))
    assert count(names, "activate_quantize") == 1
    assert any(row.pattern.startswith(f"{name} * up") for row in context.rows)
    assert y.isfinite().all()


def write_and_return(x):
    x.relu_()
    return x


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", lambda x: F.silu(x, inplace=True)),
        ("relu", nn.ReLU(inplace=True)),
        ("relu", torch.relu_),
        ("relu", write_and_return),
    ],
)
def test_activation_in_place_is_fused(name, activation):
    block, x = Block(activation=activation).eval(), torch.randn(2, 5, 64)
    y, names, context = rewritten(block, x)
    assert count(names, "activate_quantize") == 1
    assert any(row.pattern.startswith(f"{name} * up") for row in context.rows)
    with torch.no_grad():
        assert relative(y, ternc.quantize(block, ternc.Config(planes=3, method="rtn"))(x)) < 1e-3


@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, lambda x: F.leaky_relu(x, 0.2)])
def test_other_functions_are_left_alone(activation):
    _, names, _ = rewritten(Block(activation=activation).eval(), torch.randn(2, 5, 64))
    assert count(names, "activate_quantize") == 1  # the product alone: quantised after it
    assert count(names, "linears") == 4


class PostNorm(nn.Module):
    """Encoder style: the norm is read by the next product and by the residual."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        y = self.norm(x)
        return y + F.dropout(self.down(F.gelu(self.up(y))), 0.1, self.training)


def test_norm_read_twice_keeps_its_float_output():
    model = PostNorm().eval()
    x = torch.randn(3, 64)
    y, names, context = rewritten(model, x)
    assert count(names, "norm_quantize") == 1 and count(names, "layer_norm") == 0
    assert any("residual" in row.pattern for row in context.rows)
    with torch.no_grad():
        assert relative(y, ternc.quantize(model, ternc.Config(planes=3, method="rtn"))(x)) < 1e-3


class Refusals(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gain = nn.Parameter(torch.rand(64))

    def forward(self, x):
        if self.case == "mean over two dimensions":
            n = x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6) * self.gain
            return self.a(n)
        if self.case == "cube instead of square":
            n = x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6) * self.gain
            return self.a(n)
        if self.case == "broadcast residual":
            return self.a(x) + x[:1]
        if self.case == "product read twice":
            y = self.a(x)
            return (y + x) * y
        if self.case == "different inputs":
            return self.a(x) + self.b(x + 1)
        raise AssertionError(self.case)


@pytest.mark.parametrize(
    ("case", "absent"),
    [
        ("mean over two dimensions", "norm_quantize"),
        ("cube instead of square", "norm_quantize"),
        ("broadcast residual", "linears"),
        ("product read twice", "linears"),
    ],
)
def test_rules_that_must_not_fire(case, absent):
    model = Refusals(case).eval()
    x = torch.randn(2, 3, 64)
    y, names, _ = rewritten(model, x)
    assert count(names, absent) == 0
    with torch.no_grad():
        assert relative(y, ternc.quantize(model, ternc.Config(planes=3, method="rtn"))(x)) < 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_one_input_under_autocast_is_cast_once(packed):
    block, x = Block().eval(), torch.randn(2, 5, 64)
    model = ternc.quantize(block, ternc.Config(planes=3, method="rtn")) if packed else block

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    y, names, _ = rewritten(lambda x: run(model, x), x)
    assert count(names, "linears3") == 1 and count(names, "linears2") == 1
    with torch.no_grad():
        unfused = ternc.quantize(block, ternc.Config(planes=3, method="rtn"))
        assert relative(y, run(unfused, x)) < 3e-2


def test_different_inputs_are_not_shared():
    _, _, context = rewritten(Refusals("different inputs").eval(), torch.randn(2, 64))
    assert not any("shared" in row.pattern for row in context.rows)


def test_gradients_keep_norm_and_activation_in_floating_point():
    block = Block().eval().requires_grad_(False)
    x = torch.randn(2, 5, 64, requires_grad=True)
    fast = torch.compile(block, backend="ternc", options={"inner": "aot_eager", "planes": 3})
    fast(x).square().sum().backward()
    actual, x.grad = x.grad, None
    block(x).square().sum().backward()
    assert relative(actual, x.grad) < 0.2
    assert all("norm" not in row.pattern for row in ternc.report(fast).rows)


def test_float_activations_share_their_input_only():
    config = Config(planes=3, activation_bits=None)
    _, names, _ = rewritten(Block().eval(), torch.randn(2, 5, 64), config=config)
    assert count(names, "norm_quantize") == 0 and count(names, "activate_quantize") == 0
    assert count(names, "linears") == 4


def test_stale_weight_inside_a_fused_call():
    block = Block().eval()
    x = torch.randn(2, 5, 64)
    fast = torch.compile(block, backend="ternc", options={"inner": "eager", "planes": 3})
    with torch.no_grad():
        fast(x)
        block.k.weight.copy_(torch.randint(-1, 2, (32, 64)))
        block.w1.weight.fill_(0.0)
        with pytest.warns(RuntimeWarning, match="op by op"):
            y = fast(x)
        assert relative(y, ternc.quantize(block, ternc.Config(planes=3, method="rtn"))(x)) < 1e-3


class InPlace(nn.Module):
    """Writes between the reads that a rule would join."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        x = x * 1.5
        if self.case == "between two products of one input":
            first = self.a(x)
            x.add_(1.0)
            return first + self.b(x)
        if self.case == "through a view":
            first = self.a(x)
            x[:, 0].zero_()
            return first + self.b(x)
        if self.case == "norm input":
            y = self.norm(x)
            x.mul_(2.0)
            return self.a(y) + x
        if self.case == "residual":
            y = self.a(x)
            z = y + x
            x.mul_(2.0)
            return z + x
        if self.case == "activation":
            h = F.silu(x)
            h.mul_(3.0)
            return self.a(h)
        if self.case == "harmless":
            y = self.norm(x)
            x += self.a(y)
            return x
        raise AssertionError(self.case)


@pytest.mark.parametrize(
    "case",
    [
        "between two products of one input",
        "through a view",
        "norm input",
        "residual",
        "activation",
        "harmless",
    ],
)
def test_writes_in_place_are_never_passed(case):
    model = InPlace(case).eval()
    x = torch.randn(3, 5, 64)
    y, names, _ = rewritten(model, x)
    with torch.no_grad():
        assert relative(y, ternc.quantize(model, ternc.Config(planes=3, method="rtn"))(x)) < 1e-3
    if case == "harmless":
        assert count(names, "norm_quantize") == 1 and count(names, "linears") == 1


def test_weight_written_in_the_forward_stays_float():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(64, 64))

        def forward(self, x):
            self.weight.mul_(0.5)
            return F.linear(x, self.weight)

    model = Drifting().eval()
    start = model.weight.clone()
    x = torch.randn(3, 64)
    fast = torch.compile(model, backend="ternc", options={"inner": "aot_eager"})
    with torch.no_grad():
        for power in (0.5, 0.25):
            torch.testing.assert_close(fast(x), F.linear(x, start * power))
    assert "in place" in ternc.report(fast).rows[0].reason


def test_products_stay_separate_where_fused_kernels_are_missing(monkeypatch):
    monkeypatch.setattr("ternc.passes.ternary_call.FUSED_DEVICES", ())
    _, names, _ = rewritten(Block().eval(), torch.randn(2, 5, 64))
    assert count(names, "linear.") == 7
    assert not any(count(names, op) for op in ("linears", "norm_quantize", "activate_quantize"))


def test_a_block_runs_from_compiled_cpp():
    """Every fused op is called by Inductor's C++ wrapper: one weight, several, residuals."""
    block, x = Block().eval(), torch.randn(2, 5, 64)
    options = {"planes": 3, "inductor": {"cpp_wrapper": True}}
    fast = torch.compile(block, backend="ternc", options=options)
    with torch.no_grad():
        actual = fast(x)
        unfused = ternc.quantize(block, ternc.Config(planes=3, method="rtn"))
        assert relative(actual, unfused(x)) < 1e-3
