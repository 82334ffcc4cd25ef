"""quantize(model, calibration=batches): quality, reports, rotation, attention, determinism."""

import copy

import pytest
import torch
from calibration.cases import correlated
from torch import nn

import ternc
from ternc.config import Config
from ternc.errors import CheckpointError, ConfigError, InputError
from ternc.modules.attention import TernaryMultiheadAttention
from ternc.modules.linear import TernaryLinear
from ternc.quantization import quantize


class Net(nn.Module):
    """Two layers on correlated inputs; heavy-tailed weights."""

    def __init__(self, width=64, hidden=96):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer, seed in ((self.up, 1), (self.down, 2)):
            w, _ = correlated(*layer.weight.shape, 1, seed)
            layer.weight.data = w

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def data(count=9, rows=64, width=64, seed=0):
    _, x = correlated(1, width, count * rows, seed)
    return list(x.split(rows))


def rows_of(model):
    return {row.name: row for row in model._ternc_rows}


def error(q, model, batches):
    with torch.no_grad():
        x = torch.cat(batches)
        return float((q(x) - model(x)).norm() / model(x).norm())


PLAIN = {"group_size": 32, "activation_bits": None}


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_calibration_lowers_the_error_on_data_not_seen(planes):
    model, config = Net(), Config(planes=planes, **PLAIN)
    q = quantize(model, config, calibration=data())
    unseen = data(seed=0, count=20)[12:]
    assert error(q, model, unseen) < 0.85 * error(quantize(model, config), model, unseen)
    row = rows_of(q)["up"]
    assert row.output_error is not None and 0 < row.output_error < 1
    assert "gptq" in row.reason and f"planes={planes} as configured" in row.reason


def test_the_float_model_is_left_alone():
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    q = quantize(model, Config(planes=2, **PLAIN), calibration=data())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert q.training and q.up.training and model.training


@pytest.mark.parametrize(("rotation", "rotated"), [("hadamard", True), ("none", False)])
def test_rotation_is_obeyed_saved_and_loaded(rotation, rotated, tmp_path):
    model = Net()
    config = Config(planes=2, rotation=rotation, seed=7, **PLAIN)
    q = quantize(model, config, calibration=data())
    assert (q.up.rotation is not None) == (q.down.rotation is not None) == rotated
    if rotated:
        assert (q.up.rotation.block, q.down.rotation.block, q.up.rotation.seed) == (64, 32, 7)
    ternc.save(q, tmp_path)
    loaded = ternc.load(tmp_path, model=Net())
    x = data(1)[0]
    assert torch.equal(loaded(x), q(x)) and loaded.up.rotation == q.up.rotation
    again = quantize(Net(), config.__class__(planes=2, **PLAIN))
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), q(x))
    assert torch.equal(q.to(torch.float32)(x), loaded(x))


def test_auto_rotates_where_that_helps():
    model = Net()
    q = quantize(model, Config(planes=1, **PLAIN), calibration=data())
    forced = [
        quantize(model, Config(planes=1, rotation=choice, **PLAIN), calibration=data())
        for choice in ("none", "hadamard")
    ]
    errors = [rows_of(f)["up"].output_error for f in forced]
    better = errors[0] > errors[1]
    assert abs(errors[0] - errors[1]) > 0.05 * min(errors), "the case does not tell them apart"
    assert (q.up.rotation is not None) == better


def test_auto_planes_by_output_error():
    model = Net()
    found = {}
    for budget in (0.5, 0.2, 0.04, 0.001):
        q = quantize(model, Config(error_budget=budget, **PLAIN), calibration=data())
        row = rows_of(q)["up"]
        found[budget] = q.up.planes if isinstance(q.up, TernaryLinear) else None
        if found[budget] is None:
            assert row.action == "skipped" and "held-out output error" in row.reason
            assert row.output_error > budget
        else:
            assert row.output_error <= budget
    assert found[0.5] == 1 and found[0.2] == 2 and found[0.04] == 3 and found[0.001] is None


def test_uncalled_layers_say_so():
    model = Net()
    model.spare = nn.Linear(8, 8)
    q = quantize(model, Config(planes=2, group_size=4), calibration=data(2))
    assert isinstance(q.spare, TernaryLinear)
    assert "not called on the calibration data" in rows_of(q)["spare"].reason
    assert list(rows_of(q)) == ["up", "down", "spare"]


@pytest.mark.parametrize("batch", [torch.randn(4, 64), {"x": torch.randn(4, 64)}], ids=type)
def test_one_batch_is_not_taken_for_many(batch):
    with pytest.raises(InputError, match=r"give a list: \[batch\]"):
        quantize(Net(), calibration=batch)


def test_batches_with_labels_are_named():
    pairs = list(zip(data(2), torch.zeros(2), strict=True))
    with pytest.raises(InputError, match=r"batch 0 does not fit Net.forward: .*labels"):
        quantize(Net(), calibration=pairs)
    with pytest.raises(InputError, match=r"example_inputs does not fit .* argument: 'x'"):
        quantize(Net(), example_inputs={"ids": data(1)[0]})
    model = Net()
    model.register_forward_pre_hook(lambda module, args: args[:1])  # takes the labels away
    quantize(model, calibration=pairs)


def test_calibration_inputs_that_are_no_numbers_are_named():
    """Some of them are left out; where nothing is left, that is the reason, not "not called"."""
    batches = data(9)
    batches[0][3, 5] = float("nan")
    batches[1][:, 0] = float("inf")
    q = quantize(Net(), Config(planes=2, **PLAIN), calibration=batches)
    row = rows_of(q)["up"]
    assert "values beyond 1e+15 in 65 of 576 rows, left out" in row.reason
    assert row.output_error is not None and "left out" in rows_of(q)["down"].reason

    nothing = [torch.full_like(batch, float("nan")) for batch in data(2)]
    q = quantize(Net(), Config(planes=2, **PLAIN), calibration=nothing)
    row = rows_of(q)["up"]
    assert row.reason.endswith(
        "its calibration inputs hold NaN, infinity or values beyond 1e+15 in 128 of 128 rows"
    )
    assert "not called" not in row.reason and row.output_error is None

    budget = Config(bits_budget=3.0, **PLAIN)
    with pytest.raises(InputError, match="the calibration data is nan"):
        quantize(Net(), budget, calibration=nothing)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_whose_squares_leave_fp32_are_fitted_without_data(size):
    model = Net()
    expected = rows_of(quantize(model, Config(planes=2, **PLAIN)))["up"].weight_error
    model.up.weight.data *= size
    model.up.bias.data *= size
    q = quantize(model, Config(planes=2, **PLAIN), calibration=data(2))
    up, down = rows_of(q)["up"], rows_of(q)["down"]
    assert "squares of weights of" in up.reason and up.output_error is None
    assert up.weight_error == pytest.approx(expected, rel=0.01)
    if size > 1:
        assert "beyond 1e+15 in 128 of 128 rows" in down.reason


def test_exact_ternary_stays_exact_and_unrotated():
    model = Net()
    torch.manual_seed(0)
    model.up.weight.data = 0.3 * torch.randint(-1, 2, model.up.weight.shape).float()
    q = quantize(model, Config(planes=2, rotation="hadamard", **PLAIN), calibration=data(2))
    assert q.up.exact and q.up.planes == 1 and q.up.rotation is None
    assert torch.equal(q.up.weight, model.up.weight)
    assert not q.down.exact and q.down.rotation is not None


def test_shared_inputs_are_rotated_alike():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 48)

        def forward(self, x):
            return self.a(x), self.b(x)

    q = quantize(Two(), Config(planes=1, **PLAIN), calibration=data(3))
    assert q.a.rotation == q.b.rotation


def test_encoder_layers_are_calibrated_projection_by_projection():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    batches = [torch.randn(8, 6, 32) for _ in range(6)]
    config = Config(planes=2, group_size=16, activation_bits=None)
    q = quantize(model, config, calibration=batches)
    rows = rows_of(q)
    assert isinstance(q.layers[0].self_attn, TernaryMultiheadAttention)
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        row = rows[f"layers.1.self_attn.{name}"]
        assert row.output_error is not None and row.pattern == f"multihead_attention.{name}"
    assert error(q, model, batches) < error(quantize(model, config), model, batches)
    kept = quantize(
        model, Config(planes=2, group_size=16, exclude=("*_proj",)), calibration=batches
    )
    assert type(kept.layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(kept.layers[0].linear1, TernaryLinear)


def test_tied_linears_stay_tied():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    batches = data(2, width=32)
    q = quantize(model, Config(planes=2, group_size=16), calibration=batches)
    assert q[0].packed_weight is q[2].packed_weight and q[0].rotation == q[2].rotation


def test_bad_calibration_data():
    for batches, words in (([], "empty"), (["text"], "without tensors")):
        with pytest.raises(InputError, match=words):
            quantize(Net(), Config(planes=2), calibration=batches)


def test_too_few_rows_fall_back_or_hold():
    """Whatever is chosen is no worse on held-out rows than the fit without compensation."""
    model, few = Net(), data(2, rows=4)
    q = quantize(model, Config(planes=1, **PLAIN), calibration=few)
    als = quantize(model, Config(planes=1, method="als", **PLAIN), calibration=few)
    if q.up.rotation == als.up.rotation:
        assert rows_of(q)["up"].output_error <= rows_of(als)["up"].output_error
    assert error(q, model, data(4, seed=3)) < 1.0


def test_inputs_that_nothing_can_judge_are_not_fitted_to():
    """A fit without rows to judge it has error 0: "auto" would then always take one plane."""
    never = [torch.full((64, 64), torch.nan)] * 4
    for batches in (never, [torch.randn(1, 64)], [torch.randn(15, 64)]):
        q = quantize(Net(), Config(**PLAIN), calibration=batches)
        assert q.up.planes == quantize(Net(), Config(**PLAIN)).up.planes > 1
        why = "NaN, infinity or values" if batches is never else "too rarely to be judged"
        assert why in rows_of(q)["up"].reason
    row = rows_of(quantize(Net(), Config(**PLAIN), calibration=data(1, rows=16)))["up"]
    assert row.output_error is not None and row.output_error > 0


class Routed(nn.Module):
    """The second layer is called on the first batch alone, which is not one that judges."""

    def __init__(self):
        super().__init__()
        self.always, self.rare = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, rare):
        return self.rare(self.always(x)) if rare else self.always(x)


def test_a_layer_that_no_held_out_batch_reaches_is_not_judged():
    batches = [(x, index == 0) for index, x in enumerate(data())]
    found = rows_of(quantize(Routed(), Config(**PLAIN), calibration=batches))
    assert "held-out data" in found["always"].reason
    assert "too rarely to be judged" in found["rare"].reason


# Resuming.


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupted_run_goes_on_with_the_same_result(after, tmp_path, monkeypatch):
    from ternc.calibration import calibrator

    model, config = Net(), Config(planes=2, **PLAIN)
    whole = quantize(model, config, calibration=data())
    fit_group = calibrator.Calibrator._fit_group
    done = []

    def interrupted(self, group, moments):
        if len(done) == after:
            raise Interrupted
        done.append(group)
        return fit_group(self, group, moments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(calibrator.Calibrator, "_fit_group", interrupted)
        quantize(model, config, calibration=data(), resume=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == after
    fitted = []
    monkeypatch.setattr(
        calibrator.Calibrator,
        "_fit_group",
        lambda self, group, moments: fitted.append(group) or fit_group(self, group, moments),
    )
    resumed = quantize(model, config, calibration=data(), resume=tmp_path / "run")
    assert len(fitted) == 2 - after
    assert files(resumed, tmp_path / "a") == files(whole, tmp_path / "b")


def test_two_runs_of_one_seed_give_identical_files(tmp_path):
    config = Config(planes="auto", bits_budget=3.0, **PLAIN)
    runs = [quantize(Net(), config, calibration=data()) for _ in range(2)]
    first, second = (files(q, tmp_path / name) for q, name in zip(runs, "ab", strict=True))
    assert first == second


def test_another_run_is_refused(tmp_path):
    quantize(Net(), Config(planes=2, **PLAIN), calibration=data(2), resume=tmp_path)
    with pytest.raises(CheckpointError, match="other configuration"):
        quantize(Net(), Config(planes=1, **PLAIN), calibration=data(2), resume=tmp_path)
    with pytest.raises(CheckpointError, match="other calibration"):
        quantize(Net(), Config(planes=2, **PLAIN), calibration=data(3), resume=tmp_path)


def files(q, folder):
    ternc.save(q, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# A budget of bits.


@pytest.mark.parametrize("budget", [2.4, 3.0, 4.4])
def test_a_budget_of_bits_is_kept_and_used(budget):
    model = nn.Sequential(*(Net() for _ in range(3)))
    q = quantize(model, Config(bits_budget=budget, **PLAIN), calibration=data(3))
    rows = [row for row in q._ternc_rows if row.action == "rewritten"]
    count = sum(row.shape[0] * row.shape[1] for row in rows)
    bits = 8 * sum(row.bytes_at_rest for row in rows) / count
    assert bits <= budget + 1e-9
    assert len({layer.planes for layer in q.modules() if isinstance(layer, TernaryLinear)}) > 1
    assert all("by measured sensitivity" in row.reason for row in rows)


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(ConfigError, match="one plane in every layer"):
        quantize(Net(), Config(bits_budget=1.0, **PLAIN), calibration=data(2))


def test_the_backend_compiles_rotated_layers():
    model = Net().eval()
    q = quantize(model, Config(planes=2, rotation="hadamard", group_size=32), calibration=data(3))
    compiled = torch.compile(q, backend="ternc", options={"inner": "eager"})
    x = data(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), q(x))
    report = ternc.report(compiled)
    assert {row.name for row in report.rewritten} == {"up", "down"}
    torch._dynamo.reset()
