"""TernaryLinear: what it computes, what it stores, and what moves, casts and loads do to it."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ternc.config import Config
from ternc.errors import InputError, NotTernaryError
from ternc.formats import layouts
from ternc.formats.packed import unpack
from ternc.formats.quantized import Quantized
from ternc.modules.linear import TernaryLinear

AT_REST = {"trits", "scale", "scale_exponent", "multiplier"}


def make(out_features=48, in_features=130, bias=True, dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return linear, TernaryLinear.from_linear(linear, Config(**{"planes": 2, **config}))


def by_group(rows=20, columns=96, group=32):
    """A weight that is ternary by groups, with a scale that fp16 cannot hold."""
    torch.manual_seed(3)
    codes = torch.randint(-1, 2, (rows, columns)).float()
    codes[:, ::group] = 1
    scales = torch.rand(rows, columns // group) + 0.1
    return codes * scales.repeat_interleave(group, 1)


def hopeless(rows, columns):
    """Few large weights among many just below half a step: error over 0.2 with three planes."""
    weight = 0.035 * torch.randn(rows, columns).sign()
    weight[:, ::64] = 1.0
    return weight


def assert_equal_layers(a, b):
    for name in ("packed_weight", "scale", "multiplier"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y), name
    assert (a.layout, a.group_size) == (b.layout, b.group_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130,), (5, 130), (2, 3, 130), (0, 130), (2, 0, 130)])
def test_float_activations_equal_the_dequantised_product(dtype, shape):
    _, layer = make(activation_bits=None, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 48)
    weight = unpack(layer.packed).dequantize()
    expected = nn.functional.linear(x.float(), weight, layer.bias.float())
    torch.testing.assert_close(y.float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_integer_activations_are_close_to_float():
    linear, layer = make(planes=3, in_features=256)
    x = torch.randn(64, 256)
    error = (layer(x) - linear(x)).norm() / (linear(x) - linear.bias).norm()
    assert error < 0.09


def test_input_need_not_be_contiguous():
    _, layer = make()
    x = torch.randn(130, 6, 2).transpose(0, 2)
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("shape", [(3, 255), (3, 257), (255,), ()])
def test_input_of_another_width_is_refused(shape):
    """Layouts pad their columns: no kernel could tell."""
    layer = TernaryLinear.from_linear(nn.Linear(256, 8), Config(planes=1))
    with pytest.raises(InputError, match=r"last dimension must be 256"):
        layer(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_input_of_another_type_is_refused(dtype):
    layer = TernaryLinear.from_linear(nn.Linear(256, 8), Config(planes=1))
    with pytest.raises(InputError, match=f"the input is {dtype}"):
        layer(torch.zeros((3, 256), dtype=dtype))


def test_weight_is_readable_and_not_stored():
    linear, layer = make(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == linear.weight.shape
    assert torch.equal(layer.weight, unpack(layer.packed).dequantize().bfloat16())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == AT_REST | {"bias"}
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = torch.zeros(48, 130)


def test_one_plane_at_rest_and_in_memory():
    """Seeds, acceptance 1: measured bytes, uint8, at most 1.65 bits a weight at 512 x 512."""
    _, layer = make(512, 512, bias=False, planes=1, group_size=None)
    state = layer.state_dict()
    assert state["trits"].dtype == torch.uint8
    assert 8 * sum(t.nbytes for t in state.values()) / 512**2 <= 1.65
    buffers = [b.untyped_storage().nbytes() for b in layer.buffers()]
    assert 8 * sum(buffers) / 512**2 <= 2.07  # two bits a trit, and fp32 row scales


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 3),
    st.sampled_from([None, "tensor", 4, 16]),
    st.booleans(),
)
def test_state_dict_round_trip(rows, columns, planes, group, bias):
    options = {"planes": planes, "group_size": group, "bias": bias}
    _, layer = make(rows, columns, **options)
    _, other = make(rows, columns, seed=1, **options)
    other.load_state_dict(layer.state_dict())
    assert_equal_layers(layer, other)
    assert not bias or torch.equal(layer.bias, other.bias)


def test_free_scales_round_trip_exactly():
    linear = nn.Linear(96, 20)
    linear.weight.data = by_group()
    layer = TernaryLinear.from_linear(linear)
    assert layer.exact and layer.planes == 1 and torch.equal(layer.weight, linear.weight)
    state = layer.state_dict()
    assert state["scale"].dtype == torch.float32 and "scale_exponent" not in state
    # A layer that was fitted otherwise knows the group size from its configuration.
    other = TernaryLinear.from_linear(nn.Linear(96, 20), Config(planes=3, group_size=32))
    other.load_state_dict(state)
    assert torch.equal(other.weight, linear.weight)


def test_loading_keeps_addresses():
    _, layer = make(seed=1)
    before = [b.data_ptr() for b in layer.buffers()]
    layer.load_state_dict(make()[1].state_dict())
    assert [b.data_ptr() for b in layer.buffers()] == before
    layer.load_state_dict(make(seed=2)[0].state_dict())
    assert [b.data_ptr() for b in layer.buffers()] == before


def test_loads_a_float_weight_by_its_own_configuration():
    linear, expected = make()
    _, layer = make(seed=1)
    layer.load_state_dict(linear.state_dict())
    assert_equal_layers(layer, expected)
    assert torch.equal(layer.bias, linear.bias)


def test_loads_an_exactly_ternary_weight_exactly():
    _, layer = make(20, 96, bias=False)
    layer.load_state_dict({"weight": by_group()})
    assert layer.exact and layer.planes == 1
    assert torch.equal(layer.weight, by_group())


def test_loads_another_number_of_planes():
    _, layer = make(planes=3, seed=1)
    _, other = make(planes=1)
    layer.load_state_dict(other.state_dict())
    assert_equal_layers(layer, other)


def test_refuses_a_float_weight_it_would_ruin():
    linear, layer = make(planes="auto")
    before = layer.weight
    linear.weight.data = hopeless(48, 130)
    with pytest.raises(RuntimeError, match=r"weight cannot be held.*error_budget"):
        layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trits": torch.zeros(2, 48, 27, dtype=torch.uint8)}, r"x\.trits is .*\[2, 48, 27\]"),
        ({"trits": torch.zeros(2, 48, 26)}, r"x\.trits is torch.float32"),
        ({"trits": torch.zeros(4, 48, 26, dtype=torch.uint8)}, r"x\.trits has 4 planes"),
        ({"trits": torch.full((2, 48, 26), 243, dtype=torch.uint8)}, r"x\.trits: byte 243"),
        ({"scale": torch.zeros(47, dtype=torch.float16)}, "scale"),
        ({"scale": torch.zeros(48, dtype=torch.float32)}, r"x\.scale is torch.float32 beside"),
        ({"scale": torch.full((48,), torch.nan, dtype=torch.float16)}, r"x\.scale holds 48 values"),
        ({"scale_exponent": torch.tensor(9999, dtype=torch.int32)}, r"x\.scale_exponent"),
        ({"scale_exponent": torch.tensor(1.5)}, r"x\.scale_exponent"),
        ({"multiplier": torch.zeros(48, 9, dtype=torch.uint8)}, r"9 groups"),
        ({"multiplier": torch.full((48, 2), 255, dtype=torch.uint8)}, "multiplier 255"),
        ({"multiplier": torch.zeros(48, 2)}, "multiplier"),
        ({"bias": torch.zeros(47)}, r"size mismatch for x\.bias"),
        ({"weight": torch.zeros(48, 130)}, r"x\.weight stands beside"),
        ({"trits": "gone"}, r"x\.trits is a str"),
        ({"other": torch.zeros(1)}, r"Unexpected key.*x\.other"),
    ],
)
def test_damaged_states_are_refused_by_name(change, message):
    model = nn.ModuleDict({"x": make()[1]})
    state = model.state_dict()
    state.update({f"x.{name}": value for name, value in change.items()})
    before = model["x"].weight
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    if not {"bias", "other"} & set(change):
        assert torch.equal(model["x"].weight, before)


@pytest.mark.parametrize("shape", [(48, 131), (130, 48), (48,)])
def test_float_weight_of_another_shape_is_refused(shape):
    model = nn.ModuleDict({"x": make(bias=False)[1]})
    with pytest.raises(RuntimeError, match=r"x\.weight is torch.float32.*48 outputs and 130"):
        model.load_state_dict({"x.weight": torch.zeros(shape)})


def test_missing_keys_are_reported():
    model = nn.ModuleDict({"x": make()[1]})
    with pytest.raises(RuntimeError, match=r"Missing key.*x\.bias.*x\.trits"):
        model.load_state_dict({})
    result = model.load_state_dict({}, strict=False)
    assert result.missing_keys == ["x.bias", "x.trits"]
    state = model.state_dict()
    del state["x.scale"]
    with pytest.raises(RuntimeError, match=r"x\.scale is missing"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.bfloat16),
    ],
)
def test_casts_touch_the_bias_alone(cast):
    _, layer = make()
    expected = copy.deepcopy(layer)
    cast(layer)
    assert_equal_layers(layer, expected)
    assert layer.scale.dtype == torch.float32 and layer.packed_weight.dtype == torch.uint8
    assert layer.bias.dtype == layer.weight.dtype != torch.float32


def test_runs_in_half_precision_after_a_cast():
    linear, layer = make(planes=3)
    x = torch.randn(4, 130).bfloat16()
    expected = linear(x.float())
    y = layer.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


def test_autocast_gives_its_dtype():
    _, layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 130)).dtype == torch.bfloat16


def test_meta_and_back():
    _, layer = make()
    state = layer.state_dict()
    layer.to("meta")
    assert layer.packed_weight.is_meta and layer.bias.is_meta
    layer.to_empty(device="cpu")
    assert layer.layout == layouts.resident_layout(2, "cpu")
    layer.load_state_dict(state)
    assert_equal_layers(layer, make()[1])


def test_copies_are_independent_and_equal():
    _, layer = make()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal_layers(layer, twin)
        assert twin.packed_weight.data_ptr() != layer.packed_weight.data_ptr()
        x = torch.randn(3, 130)
        assert torch.equal(twin(x), layer(x))


def test_state_dict_loads_without_pickle():
    _, layer = make()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    _, other = make(seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_layers(layer, other)


def test_shared_buffers_stay_shared():
    first, second = make()[1], make(seed=1)[1]
    second.share_packed(first)
    model = nn.ModuleList([first, second, copy.deepcopy(first)])
    for change in (lambda t: t.clone(), lambda t: t.half() if t.is_floating_point() else t):
        model._apply(change)
        assert first.packed_weight is second.packed_weight
        assert first.scale.data_ptr() == second.scale.data_ptr()
        assert first.packed_weight is not model[2].packed_weight
        assert_equal_layers(first, model[2])


def test_differentiates_input_bias_and_scales_on_request():
    _, layer = make(activation_bits=None)
    x = torch.randn(6, 130, requires_grad=True)
    layer(x).square().sum().backward()
    y = nn.functional.linear(x.detach(), layer.weight, layer.bias)
    torch.testing.assert_close(x.grad, 2 * y @ layer.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, (2 * y).sum(0), rtol=1e-4, atol=1e-4)

    layer.scale_requires_grad_()
    assert {name for name, _ in layer.named_parameters()} == {"bias", "scale"}
    layer(x).sum().backward()
    unit = layer.weight / layer.scale.detach()[:, None]
    expected = (x.detach() @ unit.T).sum(0)
    torch.testing.assert_close(layer.scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_trained_scales_are_saved_as_they_are():
    _, layer = make()
    layer.scale_requires_grad_()
    with torch.no_grad():
        layer.scale.mul_(1.0001234)
    layer.scale.grad = torch.ones_like(layer.scale)
    layer.half()
    assert layer.scale.dtype == layer.scale.grad.dtype == torch.float32
    state = layer.state_dict()
    assert state["scale"].dtype == torch.float32 and "scale_exponent" not in state
    for other in (make(seed=1)[1], make(seed=1)[1].scale_requires_grad_()):
        trained = isinstance(other.scale, nn.Parameter)
        other.load_state_dict(state)
        assert torch.equal(other.scale, layer.scale)
        assert isinstance(other.scale, nn.Parameter) == trained
    layer.scale_requires_grad_(False)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_is_traced_without_a_break():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()[1]

        def forward(self, x):
            return self.layer(x.relu()) + self.layer.weight.sum()

    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(3, 130)
    assert torch.equal(compiled(x), model(x))


def test_says_its_format():
    assert "format='ternary x2 g64 a8'" in repr(make(group_size=64)[1])
    layer = make(group_size="tensor", activation_bits=None)[1]
    assert "format='ternary x2 tensor float activations'" in repr(layer)
    bits = 8 * layer.packed.nbytes / (48 * 130)
    assert f"bits={bits:.2f}" in repr(layer)


def test_refuses_what_it_cannot_hold():
    linear, _ = make()
    with pytest.raises(NotTernaryError, match=r"mlp\.up: .*error_budget"):
        TernaryLinear.from_linear(linear, Config(error_budget=0.001), "mlp.up")


def test_from_quantized_holds_the_numbers_given():
    codes = torch.randint(-4, 5, (7, 9), dtype=torch.int8)
    quantized = Quantized(codes, torch.rand(7), None, 0, 2)
    layer = TernaryLinear.from_quantized(quantized)
    assert torch.equal(layer.weight, quantized.dequantize())
    assert layer.bias is None and layer.activation_bits == 8
