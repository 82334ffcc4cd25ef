"""prepare: which layers become trainable, what stays, that nothing changes at full precision, and
that quantize packs what was trained, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from training import tiny_model, windows

import ternc
from ternc.config import Config
from ternc.errors import BlendedWeightError, ConfigError
from ternc.modules.attention import TernaryMultiheadAttention
from ternc.train import (
    Hadamard,
    QATLinear,
    Schedule,
    Stage,
    TrainConfig,
    final_quantizers,
    finish,
    insert_subln,
    prepare,
    preset,
    set_schedule,
    training_report,
)

WARM = Schedule(stages=(Stage(16, 1), Stage(1.58, 1)))
FLOAT = Config(planes=1, activation_bits=None)


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


CONFIGS = {
    "fit rows": TrainConfig(weights=Config(planes=1, group_size=None)),
    "fit tensor": TrainConfig(weights=Config(planes=1, group_size="tensor")),
    "fit groups": TrainConfig(weights=Config(planes=1, group_size=16)),
    "two planes": TrainConfig(weights=Config(planes=2, group_size=16)),
    "absmean tensor": preset("bitnet_b158"),
    "absmean groups": TrainConfig(weights=Config(planes=1, group_size=16), scale="absmean"),
    "4-bit inputs": TrainConfig(weights=Config(planes=1, activation_bits=4)),
    "everything": TrainConfig(
        schedule=WARM,
        activation_schedule=Schedule(stages=[8], stage_epochs=[1]),
        hadamard=Hadamard(),
        dead_zone=1e-2,
    ),
}


def steps(model, inputs, count=3):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_quantize_packs_what_was_trained(name):
    student = prepare(tiny_model(), CONFIGS[name])
    ids = windows(4)[:, :-1]
    steps(student, ids)
    finish(student)
    packed = ternc.quantize(student)
    with torch.no_grad():
        trained, shipped = student.eval()(ids), packed.eval()(ids)
    assert torch.equal(trained, shipped)
    rows = ternc.report(packed).rewritten
    assert len(rows) == len(ternc.sites(student)) == 14
    # The product that was trained is floating point: its sums round, and now and then an input of
    # a later layer falls on the other side of a step of 1 / 127.
    with torch.enable_grad():
        simulated = student(ids)
    assert (simulated - shipped).norm() / shipped.norm() < 2e-2


def test_saved_and_loaded_packed_model_is_the_trained_one(tmp_path):
    student = prepare(tiny_model(), CONFIGS["everything"])
    ids = windows(2)[:, :-1]
    steps(student, ids)
    packed = ternc.quantize(finish(student))
    ternc.save(packed, tmp_path)
    loaded = ternc.load(tmp_path, model=tiny_model())
    with torch.no_grad():
        assert torch.equal(loaded(ids), packed(ids))


def test_the_same_layers_as_quantize():
    model = tiny_model()
    student = prepare(model, Config(planes=1))
    packed = ternc.quantize(model, Config(planes=1))
    trained = [site.name for site in ternc.sites(student)]
    assert trained == [row.name for row in ternc.report(packed).rewritten]
    assert "lm_head" not in trained
    report = training_report(student)
    assert {row.name: row.action for row in report.rows}["lm_head"] == "skipped"
    assert report.notes == []
    mistaken = prepare(model, Config(exclude=("blocks.0", "lm_head")))
    (note,) = training_report(mistaken).notes
    assert "exclude='blocks.0' matches no layer" in note and "'blocks.0.*' would" in note
    assert type(student) is type(model) and isinstance(student.blocks[0].attention.q, QATLinear)
    assert isinstance(model.blocks[0].attention.q, nn.Linear)
    assert not isinstance(model.blocks[0].attention.q, QATLinear)
    assert student.state_dict().keys() > model.state_dict().keys()


def test_inplace_keeps_the_parameters():
    model = tiny_model()
    before = dict(model.named_parameters())
    assert prepare(model, inplace=True) is model
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())


def test_full_precision_is_an_identity_with_hadamard_on():
    model = tiny_model().eval()
    config = TrainConfig(weights=FLOAT, schedule=WARM, hadamard=Hadamard())
    student = prepare(model, config).eval()
    turned = [s for s in ternc.sites(student) if s.module.settings.rotation is not None]
    assert {s.name.rpartition(".")[2] for s in turned} == {"out", "down"}
    assert not torch.equal(turned[0].weight, model.get_submodule(turned[0].name).weight)
    ids = windows(2)[:, :-1]
    expected = model(ids)
    assert (student(ids) - expected).norm() / expected.norm() < 1e-5


def test_scale_is_folded_and_shift_is_a_zero_point():
    student = prepare(nn.Sequential(nn.Linear(32, 8)), TrainConfig(hadamard=Hadamard(("*",))))
    layer = student[0]
    with torch.no_grad():
        layer.hadamard_scale.uniform_(0.5, 2.0)
        layer.hadamard_shift.normal_()
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    for parameter in (layer.hadamard_scale, layer.hadamard_shift, layer.weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    levels = [row.abs().unique().numel() for row in layer.values()]
    assert max(levels) <= 2  # 0 and one magnitude a row: the scale is inside the codes
    with torch.no_grad():
        bare = copy.deepcopy(layer)
        bare.hadamard_shift.zero_()
        expected = bare(x) + layer.values() @ layer.hadamard_shift
    assert torch.allclose(layer(x).detach(), expected, atol=1e-5)


def test_packing_is_refused_while_blended():
    student = prepare(tiny_model(), TrainConfig(schedule=WARM))
    with pytest.raises(BlendedWeightError, match=r"blocks\.0.*16 bits.*finish"):
        ternc.quantize(student)
    set_schedule(student, WARM.at(1.3))
    with pytest.raises(BlendedWeightError, match=r"16 -> 1.58"):
        ternc.quantize(student)
    literal = Schedule(stages=[1.58], stage_epochs=[1], mode="literal")
    student = prepare(tiny_model(), TrainConfig(schedule=literal))
    set_schedule(student, literal.at(1000.0))
    with pytest.raises(BlendedWeightError):
        ternc.quantize(student)
    set_schedule(student, WARM.at(2.0))
    ternc.quantize(student)


def test_schedule_state_is_saved():
    config = TrainConfig(schedule=WARM)
    student = prepare(tiny_model(), config)
    set_schedule(student, WARM.at(1.3))
    other = prepare(tiny_model(), config)
    other.load_state_dict(student.state_dict())
    ids = windows(2)[:, :-1]
    assert torch.equal(other(ids), student(ids))
    assert ternc.sites(other)[0].quantizer.startswith("16 -> 1.58")
    with final_quantizers(other):
        assert ternc.sites(other)[0].quantizer == "1.58"
    assert ternc.sites(other)[0].quantizer.startswith("16 -> 1.58")


def test_gradient_is_straight_through():
    """The weight's gradient is that of the same product with the quantised values as Parameter."""
    layer = prepare(nn.Sequential(nn.Linear(64, 16)), TrainConfig(schedule=WARM))[0]
    x = torch.randn(9, 64)
    for progress in (0.0, 1.3, 2.0):
        layer.set_schedule(WARM.at(progress))
        layer.zero_grad()
        layer(x).sin().sum().backward()
        plain = layer.values().requires_grad_()
        q, scale = torch.ops.ternc.quantize_act(x, 8)
        nn.functional.linear(q * scale, plain, layer.bias).sin().sum().backward()
        assert torch.allclose(layer.weight.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_attention_and_encoders():
    model = encoder().eval()
    student = prepare(model, TrainConfig(weights=FLOAT, schedule=WARM)).eval()
    assert isinstance(student.layers[0].self_attn, TernaryMultiheadAttention)
    assert len(ternc.sites(student)) == 2 * 6
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        assert torch.allclose(student(x), model(x), atol=1e-5)
    calls = dict.fromkeys((s.name for s in ternc.sites(student)), 0)
    for site in ternc.sites(student):
        site.module.register_forward_hook(lambda *_, name=site.name: calls.update({name: 1}))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for training in (True, False):
            calls = dict.fromkeys(calls, 0)
            with mode():
                student.train(training)(x)
            assert all(calls.values()), (mode, training)


def test_ties_and_ternary_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    student = prepare(Tied(), TrainConfig(hadamard=Hadamard(("*",), False, False)))
    assert student.a.weight is student.b.weight and len(ternc.sites(student)) == 1
    exact = nn.Linear(16, 16)
    with torch.no_grad():
        exact.weight.copy_(torch.randint(-1, 2, (16, 16)) * 0.25)
    layer = prepare(nn.Sequential(exact), TrainConfig(schedule=WARM, hadamard=Hadamard(("*",))))[0]
    assert torch.equal(layer.values(), exact.weight)
    assert layer.quantizer == "1.58" and layer.settings.rotation is None
    frozen = nn.Sequential(copy.deepcopy(exact)).requires_grad_(False)
    assert type(prepare(frozen, TrainConfig())[0]) is nn.Linear


def test_subln_moves_with_its_layer(tmp_path):
    model = tiny_model()
    names = insert_subln(model)
    assert len(names) == 4 and insert_subln(model) == []
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).subln.weight.uniform_(0.5, 1.5)
    student = prepare(model, TrainConfig(weights=FLOAT, schedule=WARM)).eval()
    ids = windows(2)[:, :-1]
    assert torch.allclose(student(ids), model(ids), atol=1e-4)
    packed = ternc.quantize(finish(prepare(model)))
    assert sum("subln.weight" in key for key in packed.state_dict()) == 4
    ternc.save(packed, tmp_path)
    skeleton = tiny_model()
    insert_subln(skeleton)
    with torch.no_grad():
        assert torch.equal(ternc.load(tmp_path, model=skeleton)(ids), packed(ids))


def test_compiled_forward_and_backward_have_no_break():
    torch._dynamo.reset()
    config = CONFIGS["everything"]
    student = prepare(tiny_model(), config)
    ids = windows(2)[:, :-1]
    compiled = torch.compile(
        student, backend="ternc", fullgraph=True, options={"inner": "aot_eager"}
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in (0.0, 0.4, 1.0, 1.2, 1.6, 2.0, 3.0):
            set_schedule(student, config.schedule.at(epoch), config.activation_schedule.at(epoch))
            student.zero_grad()
            loss = compiled(ids).square().mean()
            loss.backward()
            grad = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
            student.zero_grad()
            expected = student(ids).square().mean()
            expected.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
            for name, parameter in student.named_parameters():
                if parameter.grad is not None:
                    cosine = nn.functional.cosine_similarity(
                        grad[name].flatten(), parameter.grad.flatten(), dim=0
                    )
                    assert cosine > 0.95, (epoch, name)


@pytest.mark.parametrize("name", ["absmean tensor", "fit rows", "everything"])
def test_compiled_inference_finds_the_trained_weights(name):
    """The backend reads a student's quantiser as a weight that is ternary by value."""
    torch._dynamo.reset()
    student = finish(prepare(tiny_model(), CONFIGS[name])).eval()
    compiled = torch.compile(student, backend="ternc", options={"inner": "eager"})
    ids = windows(2)[:, :-1]
    for _ in range(2):
        with torch.no_grad():
            found, expected = compiled(ids), student(ids)
        assert (found - expected).norm() / expected.norm() < 2e-2
        reasons = {row.name: row.reason for row in ternc.report(student).rewritten}
        assert len(reasons) == 14 and set(reasons.values()) == {"ternary by value: lowered exactly"}
        steps(student, ids, 1)


@pytest.mark.parametrize("name", ["bitnet_b158", "modern", "stages", "full"])
def test_presets_compile_to_one_graph(name):
    torch._dynamo.reset()
    student = prepare(tiny_model(), preset(name))
    options = {"inner": "eager"}
    compiled = torch.compile(student, backend="ternc", fullgraph=True, options=options)
    ids = windows(2)[:, :-1]
    assert torch.allclose(compiled(ids), student(ids), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: TrainConfig(scale="absmean", weights=Config(planes=2)), "one plane"),
        (lambda: TrainConfig(schedule=Schedule(stages=[4], stage_epochs=[1])), "last stage"),
        (
            lambda: TrainConfig(activation_schedule=Schedule(stages=[4], stage_epochs=[1])),
            "activation_bits=8",
        ),
        (lambda: TrainConfig(dead_zone=-1.0), "negative"),
        (lambda: TrainConfig(accumulate=0), "accumulate"),
        (lambda: Hadamard(layers="*"), "globs"),
        (lambda: prepare(tiny_model(), Config(planes=1, method="gptq")), "gptq"),
        (lambda: preset("best"), "preset"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        config()


@pytest.mark.parametrize("name", ["bitnet_b158", "modern", "warm_start", "stages", "full"])
def test_presets_survive_json(name):
    import json

    config = preset(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
