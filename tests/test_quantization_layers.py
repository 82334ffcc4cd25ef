"""Which layers quantize converts: subclasses, parametrisations, transposed and look-alike ones."""

import copy

import pytest
import torch
from quantization_cases import Net, TransposedLinear, rows_of
from torch import nn
from torch.nn.utils import parametrize, prune

from ternc.config import Config
from ternc.errors import UnsupportedModelError
from ternc.modules.linear import TernaryLinear
from ternc.quantization import quantize
from ternc.train import prepare


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Keeps nn.Linear's forward: its weight is what it computes with."""

    @property
    def effective(self):
        return self.weight


class AbsmeanLinear(nn.Linear):
    """A weight that is a property: quantised where it is read."""

    def __init__(self, *args):
        super().__init__(*args)
        latent = self._parameters.pop("weight")
        self.register_parameter("latent", latent)

    @property
    def weight(self):
        scale = self.latent.abs().mean()
        return (self.latent / scale).round().clamp(-1, 1) * scale


def test_a_subclass_with_its_own_forward_is_left_to_the_backend():
    q = quantize(Net(fc=Doubled(8, 8)))
    row = rows_of(q)["fc"]
    assert type(q.fc) is Doubled and row.action == "skipped"
    assert "Doubled overrides forward" in row.reason and "backend" in row.reason


def test_a_subclass_with_the_forward_of_linear_is_converted():
    assert isinstance(quantize(Net(fc=Renamed(8, 8))).fc, TernaryLinear)


def test_a_forward_replaced_on_the_instance_is_left():
    model = Net(fc=nn.Linear(8, 8))
    model.fc.forward = lambda x: x
    q = quantize(model)
    assert type(q.fc) is nn.Linear and "on the instance" in rows_of(q)["fc"].reason


class Absmean(nn.Module):
    def forward(self, weight):
        scale = weight.abs().mean()
        return (weight / scale).round().clamp(-1, 1) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parametrised_weight_is_evaluated_and_detected(dtype):
    model = Net(fc=nn.Linear(64, 48)).to(dtype)
    parametrize.register_parametrization(model.fc, "weight", Absmean())
    q = quantize(model, Config(activation_bits=None))
    assert type(q.fc) is TernaryLinear and q.fc.exact
    assert torch.equal(q.fc.weight, model.fc.weight)


def test_parametrisations_with_state_are_evaluated_as_in_eval_mode():
    model = Net(fc=nn.Linear(16, 16)).train()
    nn.utils.parametrizations.spectral_norm(model.fc)
    vector = model.fc.parametrizations.weight[0]._u.clone()
    q = quantize(model, inplace=False)
    assert torch.equal(model.fc.parametrizations.weight[0]._u, vector)
    expected = copy.deepcopy(model).eval().fc.weight
    assert (q.fc.weight - expected).norm() < 0.1 * expected.norm()
    assert q.fc.training


def test_a_weight_that_is_a_property_is_detected():
    model = Net(fc=AbsmeanLinear(64, 48))
    q = quantize(model)
    assert isinstance(q.fc, TernaryLinear) and q.fc.exact


def test_a_weight_recomputed_by_a_hook_is_left():
    model = Net(fc=nn.Linear(8, 8))
    prune.l1_unstructured(model.fc, "weight", 0.5)
    with pytest.raises(UnsupportedModelError, match="inplace=True"):
        quantize(model)  # torch cannot copy it
    quantize(model, inplace=True)
    assert type(model.fc) is nn.Linear
    assert "recomputed by a hook" in rows_of(model)["fc"].reason


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.LazyLinear(8), "not initialised"),
        (lambda: nn.Linear(8, 8, device="meta"), "meta device"),
        (lambda: nn.Linear(8, 8, dtype=torch.float64), "float64"),
        (lambda: nn.Linear(0, 8), "floating-point matrix"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element", "ignore:Lazy modules")
def test_weights_without_values_or_kernels_are_left(layer, reason):
    q = quantize(Net(fc=layer()))
    assert not isinstance(q.fc, TernaryLinear) and reason in rows_of(q)["fc"].reason


class Lookalike(TransposedLinear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("shape", [(64, 96), (48, 48)])
def test_a_transposed_linear_is_converted(shape):
    model = Net(fc=TransposedLinear(*shape))
    q = quantize(model, Config(planes=3, activation_bits=None))
    assert isinstance(q.fc, TernaryLinear) and q.fc.transposed
    assert q.fc.weight.shape == shape
    assert (q.fc.weight - model.fc.weight).norm() < 0.1 * model.fc.weight.norm()
    x = torch.randn(2, 5, shape[0])
    assert (q(x) - model(x)).norm() < 0.1 * (model(x) - model.fc.bias).norm()
    q.load_state_dict(model.state_dict())
    assert (q(x) - model(x)).norm() < 0.1 * (model(x) - model.fc.bias).norm()


def test_a_lookalike_that_computes_something_else_is_left():
    model = Net(fc=Lookalike(8, 16))
    state = torch.get_rng_state()
    q = quantize(model)
    assert type(q.fc) is Lookalike and not rows_of(q)
    assert torch.equal(state, torch.get_rng_state())  # probing it draws no numbers of the user's


def test_the_argument_has_the_name_that_it_has_in_torch():
    x, layer = torch.randn(3, 32), nn.Linear(32, 8)
    for made in (quantize(layer, Config(planes=1)), prepare(layer)):
        assert type(made) is not nn.Linear and torch.equal(made(input=x), made(x))
