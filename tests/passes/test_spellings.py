"""Spellings of a linear become `F.linear`; what looks like one stays, and the trace says why."""

from __future__ import annotations

import pytest
import torch
from graphs import run_with, targets
from torch import nn
from torch.nn import functional as F

from ternc.passes.spellings import spell_linears

W, BIAS = torch.randn(32, 12) / 6, torch.randn(12)
HEADS = torch.randn(32, 3, 4)
TAPS = torch.randn(12, 32, 3)


class Product(nn.Module):
    """`function(x, weight)` with the weight as a Parameter."""

    def __init__(self, function, weight):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(weight.clone())

    def forward(self, x):
        return self.function(x, self.weight)


SPELLINGS = {
    "@": (lambda x, w: x @ w, W),
    "matmul": (lambda x, w: torch.matmul(x, w) + BIAS, W),
    "from the left": (lambda x, w: w @ x.mT, W.t()),
    "addmm": (lambda x, w: torch.addmm(BIAS, x.flatten(0, 1), w), W),
    "addmm by names": (lambda x, w: torch.addmm(BIAS, mat1=x.flatten(0, 1), mat2=w), W),
    "mm": (lambda x, w: x.flatten(0, 1).mm(w), W),
    "transposed": (lambda x, w: x @ w.t(), W.t().contiguous()),
    "cast": (lambda x, w: x @ w.T.contiguous().float().T, W),
    "einsum": (lambda x, w: torch.einsum("bti,io->bto", x, w), W),
    "einsum with dots": (lambda x, w: torch.einsum("... k, n k -> ... n", x, w.T), W),
    "einsum into heads": (lambda x, w: torch.einsum("btd,dhk->bhtk", x, w), HEADS),
    "einsum out of heads": (
        lambda x, w: torch.einsum("bthk,dhk->btd", x.unflatten(-1, (8, 4)), w),
        HEADS.view(12, 8, 4),
    ),
    "einsum, weight first": (lambda x, w: torch.einsum("do,btd->bot", w, x), W),
    "conv1d": (lambda x, w: F.conv1d(x.mT, w.T[..., None], BIAS), W),
    "conv2d": (lambda x, w: F.conv2d(x.mT[..., None], w.T[..., None, None]), W),
}

NEAR_MISSES = {
    "einsum sums twice": (lambda x, w: torch.einsum("bti,ij->bt", x, w), W, "no product of rows"),
    "einsum keeps the sum": (
        lambda x, w: torch.einsum("bti,ij->bit", x, w),
        W,
        "no product of rows",
    ),
    "einsum of a diagonal": (
        lambda x, w: torch.einsum("tii,ij->tij", x[:, :, :5], w),
        W[:5],
        "a letter stands twice",
    ),
    "addmm scaled": (lambda x, w: torch.addmm(BIAS, x[0], w, beta=2.0), W, "beta or alpha"),
    "addmm of a matrix": (lambda x, w: torch.addmm(x[0, :, :12], x[1], w), W, "not a bias"),
    "taps": (lambda x, w: F.conv1d(x.mT, w, padding=1), TAPS, "[3] taps"),
    "stride": (lambda x, w: F.conv1d(x.mT, w[:, :, :1], stride=2), TAPS, "stride=2"),
    "groups": (lambda x, w: F.conv1d(x.mT, w[:, :4, :1], groups=8), TAPS[:8], "in groups"),
    "four dimensions": (lambda x, w: x[:, None] @ w[None], HEADS.permute(1, 0, 2), "4 dim"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_becomes_a_linear(name):
    function, weight = SPELLINGS[name]
    model, x = Product(function, weight), torch.randn(2, 5, 32)
    y, (graph,) = run_with(model, lambda gm, _: spell_linears(gm), x)
    assert targets(graph).count("linear") == 1
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_stays_and_the_trace_says_why(name, monkeypatch, capsys):
    function, weight, reason = NEAR_MISSES[name]
    monkeypatch.setenv("TERNC_TRACE", "1")
    model, x = Product(function, weight), torch.randn(2, 5, 32)
    y, (graph,) = run_with(model, lambda gm, _: spell_linears(gm), x)
    assert "linear" not in targets(graph)
    assert torch.equal(y, model(x))
    (line,) = capsys.readouterr().err.splitlines()
    assert "refused: " in line and reason in line


def test_stack_of_matrices_becomes_one_batched_product():
    stack = torch.randn(3, 32, 12)
    for function in (lambda x, w: x @ w, lambda x, w: torch.einsum("etd,edo->eto", x, w)):
        model, x = Product(function, stack), torch.randn(3, 5, 32)
        y, (graph,) = run_with(model, lambda gm, _: spell_linears(gm), x)
        assert targets(graph) == ["bmm"]
        torch.testing.assert_close(y, model(x))
