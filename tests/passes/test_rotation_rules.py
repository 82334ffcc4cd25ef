"""Rotated models in a compiled graph: no op of its own for any Hadamard."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.config import Config
from ternc.runtime import ops

ROTATED = Config(planes=3, rotation="hadamard", method="rtn")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    ops.register()


class Decoder(nn.Module):
    """Pre-norm, grouped-query attention, gated MLP."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
        self.q, self.o = nn.Linear(64, 64), nn.Linear(64, 64)
        self.k, self.v = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.w1, self.up = nn.Linear(64, 160), nn.Linear(64, 160)
        self.down = nn.Linear(160, 64)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.w1(h)) * self.up(h))


class Encoder(nn.Module):
    """LayerNorm before (GPT-2) or after (BERT) each half, stacked q/k/v, plain MLP."""

    def __init__(self, post):
        super().__init__()
        self.post = post
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def attend(self, h):
        q, k, v = self.qkv(h).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


BLOCKS = {
    "llama": Decoder,
    "gpt2": lambda: Encoder(post=False),
    "bert": lambda: Encoder(post=True),
}


def compiled(module, *args, **options):
    """Output through the backend, ops of its graph, its report."""
    fast = torch.compile(module, backend="ternc", options={"inner": "eager", **options})
    with torch.no_grad():
        y = fast(*args)
    return y, [node.target for node in ternc.report(fast).nodes], ternc.report(fast)


def count(names, op):
    """How many of these names are of one ternc op; `linears` stands for linears1, linears2, ..."""
    return sum(bool(re.search(rf"\.{op}\d*(\.default)?$", name)) for name in names)


def relative(actual, expected):
    return float((actual - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("style", BLOCKS)
def test_no_pass_of_its_own_for_a_rotation(style, dtype):
    torch.manual_seed(0)
    block = BLOCKS[style]().eval().to(dtype)
    q = ternc.quantize(block, ROTATED)
    x = torch.randn(2, 5, 64, dtype=dtype)
    y, names, _ = compiled(q, x)
    assert count(names, "hadamard") == 0
    assert count(names, "linears") == 4 and count(names, "linear") == 0
    # BERT's block begins without a norm, and ends in one that no product reads here.
    norms = 1 if style == "bert" else 2
    assert count(names, "norm_quantize") == norms
    assert count(names, "activate_quantize") == 4 - norms
    with torch.no_grad():
        assert relative(y, q(x)) < (1e-3 if dtype == torch.float32 else 2e-2)
        assert relative(y, block(x)) < 0.1


def test_rows_of_packed_layers_name_what_they_are_fused_with():
    q = ternc.quantize(Decoder().eval(), ROTATED)
    _, _, report = compiled(q, torch.randn(2, 5, 64))
    patterns = {row.name: row.pattern for row in report.rows}
    assert patterns["k"] == "rms norm + hadamard + linear; input shared with q, v"
    assert patterns["o"] == "hadamard + linear + residual"
    assert patterns["down"] == "silu * up + hadamard + linear + residual"


def test_attention_region_names_a_rotated_output_projection():
    q = ternc.quantize(Decoder().eval(), ROTATED)
    _, _, report = compiled(q, torch.randn(2, 5, 64))
    region = next(row for row in report.rows if row.pattern.startswith("attention"))
    assert region.pattern == "attention: q, k, v -> softmax(q k) v -> o"


class Readers(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.norm = nn.LayerNorm(64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        if self.case == "written in between":
            x = x * 1.5
            y = self.a(x)
            x[:, :32].add_(1.0)
            return y + self.b(x)
        h = self.norm(x)
        return self.a(h) + self.b(h) + h


def read_alike(a, b):
    """Model whose two layers have these rotations (None: not rotated)."""
    torch.manual_seed(0)
    model = Readers("").eval()
    parts = {
        name: ternc.quantize(getattr(model, name), Config(planes=3, method="rtn", **settings))
        for name, settings in (("a", a), ("b", b))
    }
    for name, part in parts.items():
        setattr(model, name, part)
    return model


HADAMARD = {"rotation": "hadamard"}


@pytest.mark.parametrize(
    ("b", "norms", "activations", "products"),
    [
        (HADAMARD, 1, 0, 1),
        ({**HADAMARD, "seed": 1}, 1, 1, 2),  # the second rotation is an op with its quantisation
        ({}, 1, 0, 2),  # its input is the norm that the residual needs anyway
    ],
)
def test_layers_of_one_input(b, norms, activations, products):
    model, x = read_alike(HADAMARD, b), torch.randn(3, 64)
    y, names, _ = compiled(model, x)
    assert count(names, "hadamard") == 0
    assert count(names, "norm_quantize") == norms
    assert count(names, "activate_quantize") == activations
    assert count(names, "linears") + count(names, "linear") == products
    with torch.no_grad():
        assert relative(y, model(x)) < 1e-3


def test_rotations_are_not_joined_over_a_write():
    model = ternc.quantize(Readers("written in between").eval(), ROTATED)
    x = torch.randn(3, 64)
    y, names, _ = compiled(model, x)
    assert count(names, "hadamard") == 2
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))


def test_another_instance_with_other_signs_gets_its_own_graph():
    """One graph serves all instances: layers rotated alike here may differ there."""
    x = torch.randn(3, 64)
    for second in (HADAMARD, {**HADAMARD, "seed": 1}, HADAMARD):
        model = read_alike(HADAMARD, second)
        fast = torch.compile(model, backend="ternc", options={"inner": "eager"})
        with torch.no_grad():
            assert relative(fast(x), model(x)) < 1e-3


def test_float_activations_and_gradients_keep_the_rotation():
    block = Decoder().eval().requires_grad_(False)
    plain = ternc.quantize(block, Config(planes=3, rotation="hadamard", activation_bits=None))
    x = torch.randn(2, 5, 64)
    y, names, _ = compiled(plain, x)
    assert count(names, "hadamard") == 4 and count(names, "linears") == 4
    with torch.no_grad():
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    q = ternc.quantize(block, ROTATED)
    x.requires_grad_()
    fast = torch.compile(q, backend="ternc", options={"inner": "aot_eager"})
    fast(x).square().sum().backward()
    actual, x.grad = x.grad, None
    block(x).square().sum().backward()
    assert relative(actual, x.grad) < 0.2


def test_one_group_one_rotation_after_loading_and_moving(tmp_path):
    q = ternc.quantize(Decoder().eval(), ROTATED)
    assert q.q.signs is q.k.signs is q.v.signs and q.w1.signs is q.up.signs
    ternc.save(q, tmp_path)
    for other in (ternc.load(tmp_path, model=Decoder()), q.to(torch.bfloat16)):
        assert other.q.signs is other.k.signs is other.v.signs
        _, names, _ = compiled(other.float(), torch.randn(2, 5, 64))
        assert count(names, "hadamard") == 0 and count(names, "linears") == 4


LIVE = {"planes": 3, "rotation": "hadamard"}


@pytest.mark.parametrize("style", BLOCKS)
def test_live_weights_are_rotated_if_asked(style):
    torch.manual_seed(0)
    block = BLOCKS[style]().eval()
    x = torch.randn(2, 5, 64)
    y, names, report = compiled(block, x, **LIVE)
    assert count(names, "hadamard") == 0
    assert count(names, "linears") == 4 and count(names, "linear") == 0
    rows = [row for row in report.rows if row.shape]
    assert all(row.format.endswith(" rotated") for row in rows)
    assert all("input rotated online" in row.reason for row in rows)
    assert sum("hadamard + " in row.pattern for row in rows) == len(rows)
    with torch.no_grad():
        assert relative(y, ternc.quantize(block, ROTATED)(x)) < 1e-3


def test_auto_rotates_no_live_weight():
    _, names, report = compiled(Decoder().eval(), torch.randn(2, 5, 64), planes=3, rotation="auto")
    assert not any("rotated" in row.format for row in report.rows)
    assert not any("signs" in name for name in names)


def test_signs_pass_through_inductor():
    model = Readers("").eval()
    fast = torch.compile(model, backend="ternc", options=LIVE)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert relative(fast(x), ternc.quantize(model, ROTATED)(x)) < 1e-3


def test_training_and_inference_give_the_same_codes():
    block = Decoder().eval()
    options = {"inner": "aot_eager", "activation_bits": None, **LIVE}
    fast = torch.compile(block, backend="ternc", options=options)
    x = torch.randn(2, 5, 64)
    trained = fast(x)
    trained.square().sum().backward()
    gradient = block.down.weight.grad.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), trained, rtol=1e-4, atol=1e-4)
    block.zero_grad()
    block(x).square().sum().backward()
    assert relative(gradient, block.down.weight.grad) < 0.2


def test_a_live_weight_that_becomes_ternary_is_held_exactly():
    model, x = Readers("").eval(), torch.randn(3, 64)
    fast = torch.compile(model, backend="ternc", options={"inner": "eager", **LIVE})
    with torch.no_grad():
        fast(x)
        model.a.weight.copy_(torch.randint(-1, 2, (64, 64)))
        with pytest.warns(RuntimeWarning, match="op by op"):
            y = fast(x)
        # The integers are those of the rotated input: another rounding, 8 bits as well.
        assert relative(y, ternc.quantize(model, ROTATED)(x)) < 2e-2
        model.a.weight.copy_(torch.randn(64, 64))
        assert relative(fast(x), ternc.quantize(model, ROTATED)(x)) < 1e-3


def test_a_live_ternary_weight_is_never_rotated():
    model, x = Readers("").eval(), torch.randn(3, 64)
    model.a.weight.data = torch.randint(-1, 2, (64, 64)).float()
    y, _, report = compiled(model, x, **LIVE)
    formats = {row.name: row.format for row in report.rows}
    assert "rotated" not in formats["a"] and "rotated" in formats["b"]
    with torch.no_grad():
        assert relative(y, ternc.quantize(model, ROTATED)(x)) < 1e-3
