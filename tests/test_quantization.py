"""quantize: what is converted, what is left alone and why, and that nothing is bypassed."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import ternc
from ternc.config import Config
from ternc.errors import ConfigError, UnsupportedModelError
from ternc.modules.attention import TernaryMultiheadAttention
from ternc.modules.linear import TernaryLinear
from ternc.quantization import quantize


def rows_of(model):
    return {row.name: row for row in model._ternc_rows}


def ternary(rows, columns, scale=0.37):
    torch.manual_seed(1)
    return scale * torch.randint(-1, 2, (rows, columns)).float()


class Net(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def test_linears_become_packed_and_the_root_keeps_its_class():
    model = Net(up=nn.Linear(64, 96), act=nn.ReLU(), down=nn.Linear(96, 32, bias=False))
    before = copy.deepcopy(model.state_dict())
    q = quantize(model)
    assert type(q) is Net and q is not model
    assert isinstance(q.up, TernaryLinear) and isinstance(q.down, TernaryLinear)
    assert type(model.up) is nn.Linear
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    x = torch.randn(128, 64)
    error = (q(x) - model(x)).norm() / model(x).norm()
    assert error < 0.1
    row = rows_of(q)["up"]
    assert row.action == "rewritten" and row.format.startswith("ternary x3")
    assert row.shape == (96, 64) and row.bytes_before == 4 * 96 * 64
    assert row.bytes_after == q.up.packed.nbytes
    state = q.up.state_dict()
    assert row.bytes_at_rest == sum(state[k].nbytes for k in ("trits", "scale"))
    weight = model.up.weight
    assert row.weight_error == pytest.approx(
        float((q.up.weight - weight.detach()).norm() / weight.detach().norm())
    )


def test_float_weights_mostly_need_three_planes():
    model = Net(**{f"l{i}": nn.Linear(256, 64) for i in range(3)})
    assert {layer.planes for layer in quantize(model).children()} == {3}
    assert {layer.planes for layer in quantize(model, Config(planes=1)).children()} == {1}
    q = quantize(model, Config(planes=1))
    assert rows_of(q)["l0"].weight_error > 0.3  # obeyed, and said


def test_inplace_and_root_linear():
    model = Net(fc=nn.Linear(16, 16))
    assert quantize(model, inplace=True) is model and isinstance(model.fc, TernaryLinear)
    root = nn.Linear(16, 8)
    packed = quantize(root)
    assert isinstance(packed, TernaryLinear) and type(root) is nn.Linear
    assert list(rows_of(packed)) == [""]
    x = torch.randn(4, 16)
    assert torch.allclose(packed(x), root(x), atol=0.2)


def test_inplace_lets_go_of_every_float_weight_as_it_goes(monkeypatch):
    import ternc.modules.conversion as conversion

    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive = []
    decide = conversion.decide

    def counting(*args):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return decide(*args)

    monkeypatch.setattr(conversion, "decide", counting)
    quantize(model, inplace=True)
    assert alive == [4, 3, 2, 1]
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_a_ternary_weight_is_held_exactly_by_value():
    model = Net(fc=nn.Linear(64, 48))
    model.fc.weight.data = ternary(48, 64)
    q = quantize(model, Config(planes=3, activation_bits=None))
    assert q.fc.exact and q.fc.planes == 1
    assert torch.equal(q.fc.weight, model.fc.weight)
    row = rows_of(q)["fc"]
    assert row.weight_error == 0 and "ternary by value" in row.reason


def test_a_weight_one_element_off_is_not_called_ternary():
    model = Net(fc=nn.Linear(64, 48))
    model.fc.weight.data = ternary(48, 64)
    model.fc.weight.data[3, 5] += 1e-3
    q = quantize(model)
    assert not q.fc.exact and rows_of(q)["fc"].weight_error > 0


def test_a_weight_over_the_budget_stays_float_and_says_so():
    model = Net(fc=nn.Linear(64, 48))
    q = quantize(model, Config(error_budget=0.001))
    assert type(q.fc) is nn.Linear
    row = rows_of(q)["fc"]
    assert row.action == "skipped" and "error_budget" in row.reason
    assert row.bytes_after == row.bytes_before == 4 * 48 * 64


def test_excluded_layers_stay():
    model = Net(fc=nn.Linear(8, 8), lm_head=nn.Linear(8, 8))
    q = quantize(model)
    assert type(q.lm_head) is nn.Linear and "excluded" in rows_of(q)["lm_head"].reason
    q = quantize(model, Config(include=("lm_head",)))
    assert isinstance(q.lm_head, TernaryLinear)


def test_int8_is_reported_as_missing():
    model = Net(embed=nn.Embedding(10, 8), fc=nn.Linear(8, 8))
    rows = rows_of(quantize(model, Config(int8=("embed", "fc"))))
    assert all(rows[name].action == "skipped" for name in ("embed", "fc"))
    assert all("not in this version" in rows[name].reason for name in ("embed", "fc"))


@pytest.mark.parametrize("config", [Config(bits_budget=2.0), Config(method="gptq")])
def test_settings_that_need_calibration_data_are_refused_without(config):
    with pytest.raises(ConfigError, match="calibration"):
        quantize(nn.Linear(4, 4), config)


@pytest.mark.parametrize("name", ["loss", "tuning", "resume"])
def test_arguments_that_need_calibration_data_are_refused_without(name):
    with pytest.raises(ConfigError, match=f"{name} needs calibration"):
        quantize(nn.Linear(4, 4), **{name: "anything"})


def test_rotation_without_calibration_data():
    model = Net(up=nn.Linear(96, 40), down=nn.Linear(40, 7))
    q = quantize(model, Config(rotation="hadamard", planes=3, activation_bits=None))
    assert q.up.rotation.block == 32 and q.down.rotation.block == 8
    assert "rotated" in rows_of(q)["up"].format
    x = torch.randn(50, 96)
    error = (q(x) - model(x)).norm() / model(x).norm()
    assert error < 0.1
    torch.testing.assert_close(q.up.weight, model.up.weight, atol=0.02, rtol=0)
    exact = Net(fc=nn.Linear(16, 16))
    exact.fc.weight.data = ternary(16, 16)
    assert quantize(exact, Config(rotation="hadamard")).fc.rotation is None


def test_free_scales():
    model = Net(fc=nn.Linear(64, 24))
    q = quantize(model, Config(tie_scales=False, planes=2, group_size=16, activation_bits=None))
    assert q.fc.scale.shape == (24, 4) and q.fc.multiplier is None
    x = torch.randn(50, 64)
    assert (q(x) - model(x)).norm() / model(x).norm() < 0.15


# Tied and shared weights.


def test_a_shared_module_is_converted_once():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    q = quantize(model)
    assert q["a"] is q["b"][0] and isinstance(q["a"], TernaryLinear)
    rows = rows_of(q)
    assert rows["b.0"].shared_with == "a" and rows["a"].shared_with is None


def test_tied_linears_share_one_packed_weight():
    model = Net(a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16))
    model.b.weight = model.a.weight
    q = quantize(model)
    assert q.a.packed_weight is q.b.packed_weight is not q.c.packed_weight
    assert q.a.scale is q.b.scale
    assert q.a.bias is not q.b.bias and torch.equal(q.b.bias, model.b.bias)
    assert rows_of(q)["b"].shared_with == "a"
    model.b.weight = nn.Parameter(model.a.weight.detach().clone())
    x = torch.randn(3, 16)
    assert torch.equal(quantize(model)(x), q(x))


def test_parameters_over_one_memory_are_one_weight():
    model = Net(a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    model.b.weight = nn.Parameter(model.a.weight.data)
    quantize(model, inplace=True)
    assert model.a.packed_weight is model.b.packed_weight


def test_a_linear_tied_to_an_embedding_stays():
    model = Net(table=nn.Embedding(12, 8), fc=nn.Linear(8, 12, bias=False))
    model.fc.weight = model.table.weight
    q = quantize(model)
    assert type(q.fc) is nn.Linear and q.fc.weight is q.table.weight
    assert "shared with 'table.weight'" in rows_of(q)["fc"].reason
    model = Net(table=nn.Embedding(12, 8), lm_head=nn.Linear(8, 12, bias=False))
    model.lm_head.weight = model.table.weight
    assert "excluded" in rows_of(quantize(model))["lm_head"].reason


def test_linears_tied_to_an_excluded_one_stay():
    model = Net(fc=nn.Linear(8, 8), lm_head=nn.Linear(8, 8))
    model.fc.weight = model.lm_head.weight
    q = quantize(model)
    assert type(q.fc) is nn.Linear and q.fc.weight is q.lm_head.weight
    assert "shared with 'lm_head.weight'" in rows_of(q)["fc"].reason


def test_other_ties_keep_the_weight_float():
    model = Net(fc=nn.Linear(8, 8), attn=nn.MultiheadAttention(8, 2), again=nn.Linear(8, 8))
    model.own = model.fc.weight
    model.again.weight = model.attn.out_proj.weight
    q = quantize(model)
    assert q.own is q.fc.weight and "shared with 'own'" in rows_of(q)["fc"].reason
    assert q.again.weight is q.attn.out_proj.weight
    assert "'attn.out_proj.weight'" in rows_of(q)["again"].reason
    assert "'again.weight'" in rows_of(q)["attn"].reason


def test_linears_of_two_spellings_do_not_share():
    model = Net(fc=nn.Linear(8, 8, bias=False), turned=TransposedLinear(8, 8))
    model.fc.weight = model.turned.weight
    q = quantize(model)
    assert q.fc.weight is q.turned.weight
    assert {row.action for row in q._ternc_rows} == {"skipped"}


# What is no plain Linear.


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


class TransposedLinear(nn.Module):
    """The older GPT spelling; no name in the product knows this class."""

    def __init__(self, nx, nf):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


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


# Attention and encoders.


MODES = {
    "train": (nn.Module.train, torch.enable_grad),
    "eval": (nn.Module.eval, torch.enable_grad),
    "no_grad": (nn.Module.eval, torch.no_grad),
    "inference_mode": (nn.Module.eval, torch.inference_mode),
}
PARTS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}


def wrap_counters(model):
    """Counters without hooks: torch leaves its fast path when it sees a hook."""
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            calls[name] = 0

            def counting(x, name=name, forward=module.forward):
                calls[name] += 1
                return forward(x)

            module.forward = counting
    return calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "exclude", [(), ("*.self_attn",), ("*.linear?",), ("*.q_proj", "*.linear1")], ids=str
)
def test_no_layer_of_an_encoder_is_bypassed(mode, padded, exclude):
    """Seeds, acceptance 2."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    q = quantize(model, Config(exclude=exclude, activation_bits=None))
    assert type(q.layers[0]) is nn.TransformerEncoderLayer
    calls = wrap_counters(q)
    assert calls
    set_mode, grad_mode = MODES[mode]
    set_mode(q), set_mode(model)
    x = torch.randn(3, 6, 32)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padded
    arguments = {"src_key_padding_mask": padding} if padded else {}
    with grad_mode():
        y = q(x, **arguments)
    assert calls == dict.fromkeys(calls, 1)
    with torch.enable_grad():  # the float model off its fast path too
        expected = model.train()(x, **arguments)
    visible = ~padding
    assert (y - expected)[visible].norm() < 0.15 * expected[visible].norm()


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_of_a_decoder_is_bypassed(mode):
    model = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    q = quantize(model)
    calls = wrap_counters(q)
    assert len(calls) == 10
    set_mode, grad_mode = MODES[mode]
    set_mode(q)
    with grad_mode():
        q(torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    assert calls == dict.fromkeys(calls, 1)


@pytest.mark.parametrize("mode", MODES)
def test_no_projection_of_attention_is_bypassed(mode):
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    q = quantize(model)
    assert isinstance(q, TernaryMultiheadAttention)
    calls = wrap_counters(q)
    set_mode, grad_mode = MODES[mode]
    set_mode(q)
    x = torch.randn(2, 5, 32)
    for need_weights in (True, False):
        with grad_mode():
            q(x, x, x, need_weights=need_weights)
    assert calls == dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), 2)


def test_attention_rows_and_bytes():
    q = quantize(Net(self_attn=nn.MultiheadAttention(32, 4)))
    rows = rows_of(q)
    assert set(rows) == PARTS
    assert rows["self_attn.k_proj"].pattern == "multihead_attention.k_proj"
    assert all(row.bytes_before == 4 * 32 * 32 for row in rows.values())


def test_attention_that_is_excluded_stays_whole():
    model = Net(self_attn=nn.MultiheadAttention(32, 4))
    q = quantize(model, Config(exclude=("self_attn",)))
    assert type(q.self_attn) is nn.MultiheadAttention
    assert type(q.self_attn.out_proj) is type(model.self_attn.out_proj)


def test_a_projection_left_in_float_holds_no_more_than_itself():
    q = quantize(nn.MultiheadAttention(32, 4), Config(exclude=("k_proj",)))
    assert type(q.k_proj) is nn.Linear and isinstance(q.q_proj, TernaryLinear)
    assert q.k_proj.weight.untyped_storage().nbytes() == 4 * 32 * 32
    assert q.k_proj.weight.requires_grad


def test_attention_loads_a_float_state_dict():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    other = quantize(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(other(x), quantize(model.eval())(x))


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_an_attention_subclass_with_its_own_forward_is_left():
    q = quantize(Net(attn=OwnAttention(16, 2)))
    assert type(q.attn) is OwnAttention and "overrides forward" in rows_of(q)["attn"].reason


# What must survive.


def test_hooks_modes_and_gradients_survive():
    model = Net(fc=nn.Linear(8, 8), norm=nn.LayerNorm(8)).eval()
    model.norm.train()
    model.fc.bias.requires_grad_(False)
    seen = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append("after"))
    model.fc.register_forward_pre_hook(lambda *_: seen.append("before"))
    quantize(model, inplace=True)
    assert not model.training and not model.fc.training and model.norm.training
    assert not model.fc.bias.requires_grad and model.norm.weight.requires_grad
    model(torch.randn(2, 8))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.randn(2, 8))
    assert seen == ["before", "after", "before"]


def test_quantizing_in_inference_mode_gives_ordinary_tensors():
    model = Net(fc=nn.Linear(8, 8))
    with torch.inference_mode():
        q = quantize(model)
    x = torch.randn(2, 8, requires_grad=True)
    q(x).sum().backward()
    assert x.grad is not None and not q.fc.packed_weight.is_inference()


def test_quantizing_twice_changes_nothing():
    q = quantize(Net(fc=nn.Linear(8, 8), lm_head=nn.Linear(8, 8)))
    bytes_before = q.fc.packed_weight.clone()
    again = quantize(q, Config(planes=1))
    assert torch.equal(again.fc.packed_weight, bytes_before)
    assert rows_of(again)["fc"] == rows_of(q)["fc"]


def test_buffers_of_the_report_stay_out_of_the_state():
    q = quantize(Net(fc=nn.Linear(8, 8)))
    assert set(q.state_dict()) == {"fc.trits", "fc.scale", "fc.scale_exponent", "fc.bias"}


class Bypassing(Net):
    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


def test_example_inputs_tell_layers_that_never_run():
    x = torch.randn(2, 8)
    for inputs in ((x,), x, {"x": x}):
        q = quantize(Bypassing(fc=nn.Linear(8, 8)), example_inputs=inputs)
        assert "not called on the example inputs" in rows_of(q)["fc"].reason
    model = Net(fc=nn.Linear(8, 8), norm=nn.BatchNorm1d(8)).train()
    q = quantize(model, example_inputs=(x,))
    assert "not called" not in rows_of(q)["fc"].reason
    assert q.norm.num_batches_tracked == 0 and q.norm.training


def test_progress_is_shown_on_request(capsys):
    quantize(Net(a=nn.Linear(8, 8), b=nn.Linear(8, 8)), progress=True)
    assert "quantize" in capsys.readouterr().err
    quantize(Net(a=nn.Linear(8, 8)))
    assert "quantize" not in capsys.readouterr().err


def test_rtn_and_als_differ():
    torch.manual_seed(0)
    model = Net(fc=nn.Linear(256, 64))
    errors = {
        method: rows_of(quantize(model, Config(planes=2, method=method)))["fc"].weight_error
        for method in ("rtn", "als", "auto")
    }
    assert errors["als"] == errors["auto"] < errors["rtn"]


def test_report_finds_rows_and_kernels():
    q = quantize(Net(fc=nn.Linear(64, 64), lm_head=nn.Linear(64, 8)))
    q(torch.randn(2, 64))
    rows = {row.name: row for row in ternc.report(q).rows}
    assert rows["fc"].kernel is not None and rows["lm_head"].kernel is None
