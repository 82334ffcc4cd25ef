"""Weights are inputs: whatever happens to them after compilation, the next call is right."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from bitlinears import Detach, absmean
from torch import nn

import ternc

OPTIONS = {"inner": "aot_eager", "planes": 3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.up = layer(64, 96)
        self.down = layer(96, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def expected(model, x):
    """The same model packed offline with the same closed-form fit."""
    packed = ternc.quantize(model, ternc.Config(planes=3, method="rtn"))
    return packed(x)


@pytest.fixture
def x():
    return torch.randn(7, 64)


def assert_current(fast, model, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected(model, x), rtol=1e-5, atol=1e-5)


def test_second_instance(x):
    a, b = Net().eval(), Net().eval()
    fast_a = torch.compile(a, backend="ternc", options=OPTIONS)
    fast_b = torch.compile(b, backend="ternc", options=OPTIONS)
    for _ in range(2):
        assert_current(fast_a, a, x)
        assert_current(fast_b, b, x)


def _copy(model):
    with torch.no_grad():
        model.up.weight.copy_(torch.randn_like(model.up.weight))


def _load(model):
    model.load_state_dict(Net().state_dict())


def _assign(model):
    model.load_state_dict(Net().state_dict(), assign=True)


def _replace_parameter(model):
    model.down.weight = nn.Parameter(torch.randn(64, 96))


def _replace_module(model):
    model.up = nn.Linear(64, 96)


def _set_data(model):
    model.up.weight.data = torch.randn(96, 64)


def _optimiser(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()


def _inference_mode(model):
    with torch.inference_mode():
        model.up.weight.copy_(torch.randn(96, 64))


@pytest.mark.parametrize(
    "change",
    [
        _copy,
        _load,
        _assign,
        _replace_parameter,
        _replace_module,
        _set_data,
        _optimiser,
        _inference_mode,
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_change_after_compile(change, x):
    model = Net().eval()
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    assert_current(fast, model, x)
    change(model)
    assert_current(fast, model, x)


def test_another_part_of_the_same_storage(x):
    model, parts = Net().eval(), torch.randn(2, 96, 64)
    model.up.weight.data = parts[0]
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    assert_current(fast, model, x)
    model.up.weight.data = parts[1]
    assert_current(fast, model, x)


def test_untraceable_write_needs_repack(x):
    model = Net().eval()
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    assert_current(fast, model, x)
    model.up.weight.data.copy_(torch.randn(96, 64))
    assert ternc.repack(model) == 2  # both weights of the model are marked
    assert_current(fast, model, x)


def test_repacking_keeps_addresses(x):
    from ternc.runtime.lower import CACHE, GRAPHS

    model = Net().eval()
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    assert_current(fast, model, x)

    def addresses():
        own = {id(parameter): parameter for parameter in model.parameters()}
        ((graph, instance),) = [
            (graph, instance) for graph in GRAPHS for instance in graph.instances_of(own)
        ]
        return [
            CACHE.peek(site, [instance[p] for p in site.inputs]).packed.weight.data_ptr()
            for site in graph.sites
        ]

    before = addresses()
    _copy(model)
    assert_current(fast, model, x)
    assert addresses() == before


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_whose_content_is_swapped(x, swapping, trained):
    """`to` and `load_state_dict` under torch.__future__: swap_tensors refuses weak references."""
    model, other = Net().eval(), Net().eval()
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    with torch.set_grad_enabled(trained):
        fast(x)
    assert_current(fast, model, x)
    for assign in (False, True):
        state = {name: tensor.neg() for name, tensor in other.state_dict().items()}
        up = model.up.weight
        model.load_state_dict(state, assign=assign)  # lives on: what it held went into `state`
        assert model.up.weight is up and torch.equal(up, -other.up.weight)
        assert_current(fast, model, x)
    model.double().float()
    with torch.set_grad_enabled(trained):
        fast(x)
    assert_current(fast, model, x)
    assert [row.kernel is not None for row in ternc.report(fast).rows] == [True, True]

    q = ternc.quantize(model)
    fast = torch.compile(q, backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(x)
        q.load_state_dict(ternc.quantize(other).state_dict(), assign=True)
        assert torch.equal(fast(x), q(x))


def test_float_instance_after_a_ternary_one(x):
    ternary, plain = Net().eval(), Net().eval()
    with torch.no_grad():
        for layer in (ternary.up, ternary.down):
            layer.weight.copy_(absmean(layer.weight))
    fast = torch.compile(ternary, backend="ternc", options=OPTIONS)
    assert_current(fast, ternary, x)
    assert all(row.weight_error == 0 for row in ternc.report(fast).rows)
    other = torch.compile(plain, backend="ternc", options=OPTIONS)
    with pytest.warns(RuntimeWarning, match="op by op"):
        assert_current(other, plain, x)
    assert_current(other, plain, x)
    report = ternc.report(other)
    assert all("op by op" in row.reason for row in report.rows)
    assert_current(fast, ternary, x)


def test_float_weights_loaded_into_a_ternary_site(x):
    model = Net().eval()
    floats = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.up.weight.copy_(absmean(model.up.weight))
        model.down.weight.copy_(absmean(model.down.weight))
    fast = torch.compile(model, backend="ternc", options=OPTIONS)
    assert_current(fast, model, x)
    model.load_state_dict(floats)
    with pytest.warns(RuntimeWarning, match="repack"):
        assert_current(fast, model, x)
    ternc.repack(model, recompile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_current(fast, model, x)
    assert all("op by op" not in row.reason for row in ternc.report(fast).rows)


def test_float_fallback_of_an_absorbed_quantiser(x):
    """Where a weight has to stay float, the activation quantiser that was absorbed comes back."""
    model = Net(Detach).eval()
    options = {"inner": "aot_eager", "error_budget": 1e-6}
    fast = torch.compile(model, backend="ternc", options=options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        model.up.weight.fill_(float("inf"))
        with pytest.warns(RuntimeWarning, match="op by op"):
            assert fast(x).isnan().all()
