"""Hand-written attention becomes scaled dot product attention; near misses stay, with a reason."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import run_with, targets
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.passes.hand_written_attention import fuse_attention
from ternc.passes.simplify import simplify

KEEP = torch.tril(torch.ones(7, 7)).bool()
MASK = torch.linspace(-2, 2, 2 * 49).view(2, 1, 7, 7)
ALIBI = torch.linspace(-1, 1, 8 * 7).view(8, 1, 7)
LEAST = torch.finfo(torch.float32).min


def softmax_float(scores, q):
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


SPELLINGS = {
    "plain": lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) / 4, dim=-1) @ v,
    "matmul": lambda q, k, v: torch.softmax(
        torch.matmul(q, k.transpose(2, 3)) * (1 / math.sqrt(16)), -1
    ).matmul(v),
    "added mask": lambda q, k, v: softmax_float(torch.matmul(q, k.mT) * 0.25 + MASK, q) @ v,
    "mask first": lambda q, k, v: (MASK + q @ k.mT).softmax(-1) @ v,
    "masked_fill": lambda q, k, v: (
        F.softmax((q @ k.transpose(-1, -2)).masked_fill(~KEEP, -math.inf), -1) @ v
    ),
    "where": lambda q, k, v: F.softmax(torch.where(KEEP, q @ k.mT * 0.25, -1e9), -1) @ v,
    "both masks": lambda q, k, v: (
        F.softmax((q @ k.permute(0, 1, 3, 2) * 0.25 + MASK).masked_fill(~KEEP, LEAST), -1) @ v
    ),
    "bmm": lambda q, k, v: torch.bmm(
        torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), -1),
        v.flatten(0, 1),
    ),
    "scaled after the mask": lambda q, k, v: F.softmax((q @ k.mT + MASK) * 0.25, -1) @ v,
    "baddbmm": lambda q, k, v: torch.bmm(
        F.softmax(
            torch.baddbmm(ALIBI, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.25), -1
        ),
        v.flatten(0, 1),
    ),
    "heads apart for the mask": lambda q, k, v: torch.bmm(
        F.dropout(
            F.softmax(
                torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(2, 4, 7, 7) + MASK, -1
            ).view(8, 7, 7),
            0.0,
            True,
        ),
        v.flatten(0, 1),
    ),
    "heads together again for the softmax": lambda q, k, v: torch.bmm(
        F.softmax(
            (torch.baddbmm(ALIBI, q.flatten(0, 1), k.flatten(0, 1).mT).view(2, 4, 7, 7) + MASK)
            .masked_fill(~KEEP, LEAST)
            .view(8, 7, 7),
            -1,
        ),
        v.flatten(0, 1),
    ),
    "dropout in eval": lambda q, k, v: F.dropout(F.softmax(q @ k.mT, -1), 0.1, False) @ v,
}

NEAR_MISSES = {
    "sinks": lambda q, k, v: (
        F.softmax(torch.cat([q @ k.mT, MASK[:, :, :, :1].expand(2, 4, 7, 1)], -1), -1)[..., :-1] @ v
    ),
    "scaled by a tensor": lambda q, k, v: F.softmax(q @ k.mT * MASK, -1) @ v,
    "through tanh": lambda q, k, v: F.softmax(torch.tanh(q @ k.mT), -1) @ v,
    "key not transposed": lambda q, k, v: F.softmax(q @ k.reshape(2, 4, 16, 7), -1) @ v,
}


@pytest.fixture
def qkv():
    return tuple(torch.randn(2, 4, 7, 16) for _ in range(3))


def fused(function, *args):
    skipped = []

    def edit(gm, inputs):
        simplify(gm)
        skipped.extend(fuse_attention(gm))

    output, (graph,) = run_with(function, edit, *args)
    return output, "scaled_dot_product_attention" in targets(graph), skipped


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused(name, qkv):
    output, found, skipped = fused(SPELLINGS[name], *qkv)
    assert found and not skipped
    torch.testing.assert_close(output, SPELLINGS[name](*qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_with_a_reason(name, qkv):
    output, found, skipped = fused(NEAR_MISSES[name], *qkv)
    assert not found
    assert len(skipped) == 1 and skipped[0].reason
    assert torch.equal(output, NEAR_MISSES[name](*qkv))


def test_weights_that_are_returned_are_kept(qkv):
    def attend(q, k, v):
        weights = F.softmax(q @ k.mT, -1)
        return weights @ v, weights

    (output, weights), found, skipped = fused(attend, *qkv)
    assert not found and "used by something else" in skipped[0].reason
    torch.testing.assert_close((output, weights), attend(*qkv))


def test_softmax_over_another_dimension_is_no_attention(qkv):
    _, found, skipped = fused(lambda q, k, v: F.softmax(q @ k.mT, dim=1) @ v, *qkv)
    assert not found and not skipped


def test_region_is_one_row():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            q, k, v = (p(x).view(2, 5, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.softmax(q @ k.mT * 0.25, -1) @ v
            return self.o(y.transpose(1, 2).reshape(2, 5, 64))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch._dynamo.reset()
    model = Model().eval()
    with torch.no_grad():
        report = ternc.explain(model, torch.randn(2, 5, 64))
    assert [(row.name, row.pattern) for row in report.attention] == [
        ("layers.0", "attention: q, k, v -> softmax(q k) v -> o"),
        ("layers.1", "attention: q, k, v -> softmax(q k) v -> o"),
    ]
    assert len(report.rewritten) == 8


def test_dropout_in_training_is_part_of_attention(qkv):
    def attend(q, k, v):
        return F.dropout(F.softmax(q @ k.mT, -1), 0.5, True) @ v

    output, found, _ = fused(attend, *qkv)
    assert found and not torch.equal(output, fused(attend, *qkv)[0])
    everything, found, _ = fused(lambda q, k, v: F.dropout(F.softmax(q @ k.mT, -1), 1.0) @ v, *qkv)
    assert found and not everything.any()


def test_attention_that_stays_is_a_region_with_its_reason():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.o(F.softmax(torch.tanh(self.q(x) @ x.mT), -1) @ x)

    torch._dynamo.reset()
    with torch.no_grad():
        report = ternc.explain(Model(), torch.randn(2, 5, 16), config=ternc.Config(planes=3))
    (row,) = report.attention
    assert row.pattern == "attention: q -> softmax(q k) v -> o"
    assert row.action == "skipped" and row.reason.endswith("computed with 'tanh'")
