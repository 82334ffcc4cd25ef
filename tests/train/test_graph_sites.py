"""Sites of a float model that the backend trains: names, states, and the values of a QATLinear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ternc
from ternc.config import Config
from ternc.errors import TrainingError
from ternc.train import TrainConfig, prepare
from ternc.train.schedule import BlendState, Schedule

FINAL = BlendState(1.58, 1.58, 1.0)
STATES = {
    "float": (BlendState(16, 16, 1.0), BlendState(16, 16, 1.0)),
    "between floats and 8": (BlendState(16, 8, 0.25), BlendState(16, 8, 0.5)),
    "between 2 and ternary": (BlendState(2, 1.58, 0.75), BlendState(8, 8, 1.0)),
    "final": (FINAL, BlendState(8, 8, 1.0)),
}


class Model(nn.Module):
    """A linear, one inside a checkpoint, one that holds its weight the other way round."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(64, 48), nn.Linear(48, 48)
        self.turned = nn.Parameter(torch.randn(48, 32) / 7)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = checkpoint(self.inner, x, use_reentrant=False)
        return x @ self.turned


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def compiled(model):
    return torch.compile(model, backend="ternc", options={"inner": "aot_eager", "planes": 1})


def set_all(model, name):
    for site in ternc.sites(model):
        site.set_schedule(*STATES[name])


def test_schedule_moves_without_compiling():
    model, x = Model(), torch.randn(3, 64)
    fast = compiled(model)
    outputs = [fast(x).detach()]
    assert [site.name for site in ternc.sites(fast)] == ["turned", "first", "inner"]
    for name in STATES:
        set_all(fast, name)
        outputs.append(fast(x).detach())
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(outputs[1], model(x).detach())
    torch.testing.assert_close(outputs[-1], outputs[0], rtol=0, atol=0)
    assert not torch.equal(outputs[2], outputs[3])
    assert {site.quantizer for site in ternc.sites(fast)} == {"1.58"}
    assert not list(ternc.report(fast).skipped)


@pytest.mark.parametrize("name", STATES)
def test_values_and_gradients_are_those_of_a_prepared_model(name):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    everything = Schedule([16, 8, 4, 2, 1.58], [1] * 5)
    activations = Schedule([16, 8], [1] * 2, bits=(16.0, 8.0, 4.0))
    config = TrainConfig(
        weights=Config(planes=1), schedule=everything, activation_schedule=activations
    )
    student, x = prepare(copy.deepcopy(model), config), torch.randn(5, 64)
    fast = compiled(model)
    fast(x)
    found = []
    for trained in (fast, student):
        set_all(trained, name)
        y = trained(x)
        y.square().sum().backward()
        values = [site.values() for site in ternc.sites(trained)]
        found.append((y.detach(), values, [site.weight.grad for site in ternc.sites(trained)]))
    torch.testing.assert_close(*found)


def test_a_graph_has_no_layers():
    fast = compiled(Model())
    fast(torch.randn(3, 64))
    with pytest.raises(TrainingError, match="prepare"):
        _ = ternc.sites(fast)[0].module


def test_every_instance_has_its_own_state():
    first, second, x = Model(), Model(), torch.randn(3, 64)
    for model in (first, second):
        compiled(model)(x)
    set_all(first, "float")
    torch.testing.assert_close(compiled(first)(x), first(x))
    assert {site.quantizer for site in ternc.sites(second)} == {"1.58"}


def test_packing_ignores_a_schedule_and_evaluation_is_final():
    """Without gradients the packed op runs: the final quantiser, as before any schedule."""
    model, x = Model(), torch.randn(3, 64)
    fast = compiled(model)
    with torch.no_grad():
        expected = fast(x)
    fast(x)
    set_all(fast, "float")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=0)
