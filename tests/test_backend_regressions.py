"""Defects that the backend had: models that once gave a wrong result, crashed or were misread."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn import functional as F

import ternc
from ternc.backend import ternc_backend
from ternc.errors import DifferentiationError
from ternc.runtime.lower import GRAPHS


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Two(nn.Module):
    """b(between(a(x)))."""

    def __init__(self, between=F.gelu):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def compiled(model, **options):
    return torch.compile(model, backend="ternc", options={"inner": "aot_eager", **options})


def packed(model, **settings):
    return ternc.quantize(model, ternc.Config(**{"planes": 3, "method": "rtn", **settings}))


def assert_same(model, x, tolerance=1e-5):
    """The compiled model agrees with the same model packed offline; returns its report."""
    expected_model, given = packed(model), x.clone()
    fast = compiled(model, planes=3)
    with torch.no_grad():
        expected, y = expected_model(given), fast(x)
    assert y.dtype == expected.dtype
    assert relative(y, expected) < tolerance
    return ternc.report(fast)


def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_update_after_a_second_graph():
    """The second graph found the weights packed, and kept its first decision for later."""
    model = Two().eval()
    fast = compiled(model, planes=3)
    with torch.no_grad():
        fast(torch.randn(3, 64))
        x = torch.randn(2, 3, 64)
        fast(x)
        assert all(site.first is None for graph in GRAPHS for site in graph.sites)
        for parameter in model.parameters():
            parameter.mul_(-1.5)
        assert relative(fast(x), packed(model)(x)) < 1e-5


def test_data_that_returns_to_an_old_address():
    model = Two().eval()
    fast = compiled(model, planes=3)
    x = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(6):
            fast(x)
            for factor in (-1.0, 1.5, 1.0):
                for parameter in model.parameters():
                    parameter.data = parameter.data * factor
            assert relative(fast(x), packed(model)(x)) < 1e-5


def test_step_of_a_fused_optimiser():
    """It writes the parameters and leaves their versions as they were."""
    model, x = Two(), torch.randn(3, 64)
    fast = compiled(model, planes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        fast(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert relative(fast(x), packed(model)(x)) < 1e-5


def test_one_model_compiled_with_two_settings():
    model = nn.Linear(256, 64).eval()
    x = torch.randn(3, 256)
    with torch.no_grad():
        for size in (128, 32):
            fast = compiled(model, planes=3, group_size=size)
            assert relative(fast(x), packed(model, group_size=size)(x)) < 1e-5


def test_report_after_a_parameter_was_replaced():
    model = Two().eval()
    fast = compiled(model)
    with torch.no_grad():
        fast(torch.randn(3, 64))
        model.a.weight = nn.Parameter(torch.randn(64, 64))
        fast(torch.randn(3, 64))
    assert [row.name for row in ternc.report(fast).rewritten] == ["a", "b"]


def _add_in_place_fp32(h):
    g = h * 2
    g += torch.ones(64, dtype=torch.float32)
    return g


def test_sum_in_place_keeps_its_dtype():
    assert_same(Two(_add_in_place_fp32).to(torch.bfloat16), torch.randn(5, 64).bfloat16())


VIEWS = {
    "movedim": lambda g: g.movedim(0, 0),
    "ravel": lambda g: g.ravel().view_as(g),
    "expand_as": lambda g: g.expand_as(g),
    "dropout in eval": lambda g: F.dropout(g, 0.5, training=False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view_sees_a_later_write(name):
    def between(h):
        g = h * 2
        view = VIEWS[name](g)
        g += 1
        return view * 1

    assert_same(Two(between), torch.randn(2, 5, 64))


LOOK_ALIKES = {
    "clipped relu": lambda h: F.hardtanh(h, 0, 20),
    "clipped gelu": lambda h: F.gelu(h).clamp(max=10),
    "rows moved": lambda h: F.gelu(h).roll(1, 1),
    "rows transposed": lambda h: F.gelu(h).transpose(0, 1),
    "doubled gate": lambda h: h * _doubled(torch.sigmoid(h)),
}


def _doubled(gate):
    gate.mul_(2)
    return gate


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_only_looks_like_an_activation(name):
    assert_same(Two(LOOK_ALIKES[name]), 60 * torch.randn(4, 4, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_default_epsilon_of_rms_norm(dtype):
    model = Two(lambda h: F.rms_norm(h * 1e-3, (64,))).to(dtype)
    report = assert_same(model, torch.randn(5, 64).to(dtype))
    assert "norm" in report.rewritten[1].pattern


class Attention(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.change = change

    def forward(self, x):
        batch, tokens, _ = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, 4, 16).permute(2, 0, 3, 1, 4)
        q, k, v = parts[0], parts[1], parts[2]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = q @ k.transpose(-2, -1) * 0.25
        scores = self.change(scores, hidden)
        y = F.softmax(scores, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 64))


def _statement(write):
    def change(scores, hidden):
        write(scores, hidden)
        return scores

    return change


WRITES = {
    "masked_fill_": lambda s, hidden: s.masked_fill_(hidden, float("-inf")),
    "setitem": lambda s, hidden: s.__setitem__(hidden.expand_as(s), float("-inf")),
    "add_": lambda s, hidden: s.add_(hidden * -30.0),
    "mul_ of a view": lambda s, hidden: s.view(-1, 5, 5).mul_(0.1),
}


@pytest.mark.parametrize("name", WRITES)
def test_scores_written_in_place(name):
    assert_same(Attention(_statement(WRITES[name])), torch.randn(2, 5, 64))


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_row_whose_every_score_is_hidden(least):
    def change(scores, hidden):
        hidden[2] = True
        return scores.masked_fill(hidden, least)

    assert_same(Attention(change), torch.randn(2, 5, 64))


def test_result_written_to_an_argument():
    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.eye(64)), nn.Parameter(torch.ones(64))

        def forward(self, x):
            y = torch.zeros(5, 64)
            torch.addmm(self.bias, x, self.weight, out=y)
            return y * 2

    model, x = Out(), torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))


WEIGHT_WRITES = {
    "row": lambda weight: weight[0].zero_(),
    "detach": lambda weight: weight.detach().mul_(0.5),
    "data": lambda weight: weight.data.mul_(0.5),
    "view": lambda weight: weight.view(-1)[:2048].zero_(),
}


@pytest.mark.parametrize("name", WEIGHT_WRITES)
def test_weight_written_through_a_view(name):
    class Writing(nn.Linear):
        def forward(self, x):
            WEIGHT_WRITES[name](self.weight)
            return super().forward(x)

    model = Writing(64, 64)
    same, fast, x = copy.deepcopy(model), compiled(model, planes=3), torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), same(x))
    assert "in place" in ternc.report(fast).skipped[0].reason


@pytest.mark.parametrize("add", [False, True])
def test_no_gradient_through_a_part_without_gradients(add):
    class Part(Two):
        def forward(self, x):
            with torch.no_grad():
                constant = self.a(x)
            return constant + (x if add else self.b(x))

    model = Part().eval().requires_grad_(False)
    gradients = []
    for run in (packed(model), compiled(model, planes=3)):
        x = torch.linspace(-1, 1, 192).view(3, 64).requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert relative(gradients[1], gradients[0]) < 1e-5


def test_gradients_inside_a_call_without_them():
    class Energy(Two):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.b(F.gelu(F.layer_norm(self.a(x), (64,)))).square().sum()
                return torch.autograd.grad(energy, x)[0]

    assert_same(Energy().eval().requires_grad_(False), torch.randn(3, 64))


def test_own_quantiser_does_not_fix_the_number_of_tokens():
    def quantised(h):
        scale = 127 / h.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return h + ((h * scale).round().clamp(-128, 127) / scale - h).detach()

    counter = CompileCounterWithBackend(
        lambda gm, inputs: ternc_backend(gm, inputs, options={"inner": "eager"})
    )
    fast = torch.compile(Two(quantised).eval(), backend=counter)
    with torch.no_grad():
        for tokens in (5, 7, 9, 11):
            fast(torch.randn(2, tokens, 64))
    assert counter.frame_count == 2


def test_training_and_inference_have_the_same_codes():
    model, x = nn.Linear(64, 32), torch.randn(3, 64)
    fast = compiled(model, planes=3)
    trained = fast(x).detach()
    with torch.no_grad():
        assert relative(fast(x), trained) < 1e-5


def test_autocast_of_packed_modules_that_are_fused():
    class Pair(Two):
        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = packed(Pair().eval()), torch.randn(3, 64)
    fast = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = fast(x), model(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert relative(y, expected) < 1e-2


def test_transforms_of_functions_are_left_alone():
    model, x = Two().eval(), torch.randn(4, 3, 64)
    vmapped = compiled(lambda x: torch.vmap(model)(x))
    with torch.no_grad():
        torch.testing.assert_close(vmapped(x), model(x))
    assert {row.reason for row in ternc.report(model).skipped} == {
        "inside a transform of torch.func (vmap, grad, jvp)"
    }


def test_forward_mode_is_refused_and_jvp_is_right():
    model, x, t = Two().eval().requires_grad_(False), torch.randn(3, 64), torch.randn(3, 64)
    fast = compiled(model)
    fast(x)
    with forward_ad.dual_level():
        assert fast(x).shape == x.shape
        with pytest.raises(DifferentiationError, match=r"torch.func.jvp"):
            fast(forward_ad.make_dual(x, t))
    expected = torch.func.jvp(model, (x,), (t,))[1]
    assert relative(torch.func.jvp(fast, (x,), (t,))[1], expected) < 0.1


def test_gates_of_gated_products_are_packed_and_routers_are_not():
    class Gated(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.gate, self.up = nn.Linear(64, outputs), nn.Linear(64, outputs)

        def forward(self, x):
            return F.silu(self.gate(x)) * self.up(x)

    for outputs, action in ((128, "rewritten"), (48, "skipped")):
        x = torch.randn(3, 64)
        for report in (
            ternc.report(ternc.quantize(Gated(outputs))),
            ternc.explain(Gated(outputs), x),
        ):
            assert {row.name: row.action for row in report.rows} == {
                "gate": action,
                "up": "rewritten",
            }


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (nn.Linear(64, 8, device="meta"), torch.randn(3, 64, device="meta"), "meta"),
        (nn.Linear(8, 0), torch.randn(3, 8), "no elements"),
    ],
    ids=["meta", "empty"],
)
def test_weight_without_values_says_so(model, x, words):
    fast = compiled(model)
    with torch.no_grad():
        assert fast(x).shape == model(x).shape
    assert words in ternc.report(fast).skipped[0].reason
