"""quantize: what is converted, what is left alone and why, and that nothing is bypassed."""

import copy
import gc
import weakref

import pytest
import torch
from quantization_cases import Net, TransposedLinear, rows_of
from torch import nn

import ternc
from ternc.config import Config
from ternc.errors import ConfigError
from ternc.modules.linear import TernaryLinear
from ternc.quantization import quantize


def ternary(rows, columns, scale=0.37):
    torch.manual_seed(1)
    return scale * torch.randint(-1, 2, (rows, columns)).float()


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
    decide = conversion.decide_rotated

    def counting(*args):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return decide(*args)

    monkeypatch.setattr(conversion, "decide_rotated", counting)
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
    assert q.fc.scale.shape == (24, 4 * 2) and q.fc.multiplier is None
    x = torch.randn(50, 64)
    assert (q(x) - model(x)).norm() / model(x).norm() < 0.15


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
