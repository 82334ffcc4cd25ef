"""Stacked, batched and listed experts: ternary products, one quantisation of every token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.formats import layouts
from ternc.runtime import ops

EXPERTS, WIDTH, HIDDEN = 3, 64, 40


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    ops.register()


class Experts(nn.Module):
    """Norm, router, experts in one of three forms, residual."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        if form == "listed":
            self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * HIDDEN) for _ in range(EXPERTS))
            self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(EXPERTS))
        else:
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN) / 8)
            self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 6)

    def forward(self, x):
        h = self.norm(x).view(-1, WIDTH)
        weights = self.router(h).softmax(-1)
        return x + getattr(self, self.form)(h, weights).view(x.shape)

    def listed(self, h, weights):
        y = torch.zeros_like(h)
        for i in range(EXPERTS):
            gate, up = self.up[i](h).chunk(2, -1)
            y = y + self.down[i](F.silu(gate) * up) * weights[:, i, None]
        return y

    def batched(self, h, weights):
        gate, up = torch.bmm(h.expand(EXPERTS, -1, -1), self.up).chunk(2, -1)
        return torch.einsum("esn,se->sn", torch.bmm(F.silu(gate) * up, self.down), weights)

    def grouped(self, h, weights):
        chosen, expert = weights.topk(2, dim=-1)
        order = expert.flatten().argsort()
        counts = F.one_hot(expert.flatten(), EXPERTS).sum(0)
        ends = counts.cumsum(0).to(torch.int32)
        rows = h[order // 2]
        gate, up = F.grouped_mm(rows, self.up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        y = y * chosen.flatten()[order, None]
        return torch.zeros_like(h).index_add(0, order // 2, y)


def reference(model, x):
    """The same with every product on dequantised weights and quantised activations."""

    def fitted(w):  # [N, K]
        return torch.ops.ternc.fake_quantize(w, 3, 0)

    def act(h):
        return torch.ops.ternc.fake_quantize_act(h, 8)

    def weight(stack, i):
        if model.form == "listed":
            return fitted(stack[i].weight), stack[i].bias
        turned = stack.transpose(-2, -1)
        return fitted(turned.flatten(0, 1)).view(turned.shape)[i], None

    h = model.norm(x).view(-1, WIDTH)
    weights = model.router(h).softmax(-1)
    if model.form == "grouped":
        kept = torch.zeros_like(weights).scatter(1, weights.topk(2, -1).indices, 1.0)
        weights = weights * kept
    y = torch.zeros_like(h)
    for i in range(EXPERTS):
        gate, up = F.linear(act(h), *weight(model.up, i)).chunk(2, -1)
        y = y + F.linear(act(F.silu(gate) * up), *weight(model.down, i)) * weights[:, i, None]
    return x + y.view(x.shape)


def relative(actual, expected):
    return float((actual - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("form", "products", "activations", "norms"),
    [("listed", 4, 3, 1), ("batched", 2, 1, 0), ("grouped", 2, 1, 1)],
)
def test_experts_are_ternary_and_quantise_once(form, products, activations, norms):
    # torch traces its grouped product in bfloat16 alone.
    dtype = torch.bfloat16 if form == "grouped" else torch.float32
    model, x = Experts(form).eval().to(dtype), torch.randn(2, 5, WIDTH, dtype=dtype)
    fast = torch.compile(model, backend="ternc", options={"inner": "aot_eager", "planes": 3})
    with torch.no_grad():
        assert relative(fast(x), reference(model, x)) < (1e-2 if form == "grouped" else 1e-3)
        fast(torch.randn(3, 5, WIDTH, dtype=dtype))
    report = ternc.report(fast)
    names = [node.target for node in report.nodes if ":" not in node.name]
    count = {op: sum(f"ternc.{op}" in name for name in names) for op in ("norm", "activate")}
    assert count == {"norm": norms, "activate": activations}
    assert sum(n.startswith(("ternc.linear", "ternc.grouped")) for n in names) == products
    assert not any("quantize_act." in name for name in names)
    assert {row.name for row in report.skipped} == {"router"}


def test_stacks_are_not_dense_where_other_weights_are(monkeypatch):
    """Blocks of the dense layout would hold parts of two experts."""
    model, x = Experts("batched").eval(), torch.randn(2, 5, WIDTH)
    outputs = []
    for dense_from in (0, 1):
        monkeypatch.setattr(layouts, "_dense_from", dense_from)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="ternc", options={"inner": "eager", "planes": 1})
        with torch.no_grad():
            outputs.append(fast(x))
    assert torch.equal(*outputs)


def test_experts_are_trained_straight_through():
    model, x = Experts("batched"), torch.randn(2, 5, WIDTH)
    fast = torch.compile(model, backend="ternc", options={"inner": "aot_eager", "planes": 3})
    fast(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = reference(model, x)
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert {row.pattern for row in ternc.report(fast).rewritten} == {"stacked experts (training)"}


@pytest.mark.parametrize("form", ["batched", "grouped"])
def test_stale_experts_run_op_by_op(form):
    dtype = torch.bfloat16 if form == "grouped" else torch.float32
    model, x = Experts(form).eval().to(dtype), torch.randn(2, 5, WIDTH, dtype=dtype)
    fast = torch.compile(model, backend="ternc", options={"inner": "eager", "planes": 3})
    with torch.no_grad():
        fast(x)
        model.up.copy_(torch.randint(-1, 2, model.up.shape))
        model.down.mul_(2.0)
        with pytest.warns(RuntimeWarning, match="op by op"):
            y = fast(x)
        assert relative(y, reference(model, x)) < (1e-2 if form == "grouped" else 1e-3)
