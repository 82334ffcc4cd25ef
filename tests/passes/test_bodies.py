"""Activation checkpointing: bodies are rewritten, and give what the layers give without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ternc
from ternc.config import Config


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


@pytest.fixture
def pair():
    """The same model with checkpoints and without; one weight is frozen."""
    torch._dynamo.reset()
    model = Stack(True)
    model.layers[0].up.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.checkpointed = False
    return model, plain


def compiled(model):
    return torch.compile(model, backend="ternc", options={"inner": "aot_eager", "planes": 3})


def test_training_rewrites_the_body(pair):
    x, found = torch.randn(3, 64), []
    for model in pair:
        fast = compiled(model)
        y = fast(x)
        y.square().sum().backward()
        found.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}))
        rows = {row.name: row for row in ternc.report(fast).rewritten}
        assert set(rows) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")}
        assert "training" in rows["layers.1.up"].pattern
        assert "training" not in rows["layers.0.up"].pattern, "the frozen weight is packed"
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_without_gradients_a_checkpoint_hides_nothing(pair):
    fast = compiled(pair[0])
    with torch.no_grad():
        x = torch.randn(3, 64)
        torch.testing.assert_close(fast(x), compiled(pair[1])(x), rtol=0, atol=0)
    patterns = [row.pattern for row in ternc.report(fast).rewritten]
    assert patterns == ["layer norm + linear", "relu + linear + residual"] * 2


def test_stale_weight_inside_a_body(pair):
    model, x = pair[0], torch.randn(3, 64)
    fast = compiled(model)
    fast(x)
    with torch.no_grad():
        model.layers[0].up.weight.copy_(torch.randint(-1, 2, (96, 64)))
    with pytest.warns(RuntimeWarning, match="op by op"):
        y = fast(x)
    packed = ternc.quantize(pair[0], Config(planes=3, method="rtn"))
    packed.checkpointed = False
    with torch.no_grad():
        torch.testing.assert_close(y, packed(x), rtol=1e-5, atol=1e-5)
