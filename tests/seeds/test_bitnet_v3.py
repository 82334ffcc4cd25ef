"""`ternc.bitnet_v3`: every name, argument and snippet of the page."""

import json

import pytest
import torch
from bitnet_models import PLAIN, SMALL, batches, data, model
from torch import nn

import ternc
import ternc.bitnet_v3 as bitnet_v3
from ternc.bitnet_v3.core import quantize_activations, quantize_weights
from ternc.errors import CheckpointError, ConfigError, InputError, TrainingError

PAGE = """
core modules models training utils BitNetV3Config BitNetV3Model BitNetV3Trainer EnhancedHBitLinear
MultiStageProgressiveQuantizer AdaptiveHadamardTransform GradientAwareKnowledgeDistillation
MPQScheduler hadamard_transform create_model create_trainer convert_to_bitnet_v3 compute_perplexity
compute_efficiency_metrics evaluate_downstream_tasks BitNetV3ForCausalLM
replace_linear_with_bitlinear create_bitlinear_layer create_mpq_schedule
"""


def test_names_of_the_page():
    assert set(PAGE.split()) == set(bitnet_v3.__all__)
    assert all(hasattr(bitnet_v3, name) for name in bitnet_v3.__all__)


def test_simple_usage():
    made = bitnet_v3.create_model(**SMALL)
    trainer = bitnet_v3.create_trainer(
        made, learning_rate=3e-4, batch_size=8, enable_mpq=True, enable_gakd=True
    )
    with pytest.warns(UserWarning, match="no teacher"):
        rows = trainer.train(batches(), num_epochs=4)
    assert rows[-1]["step"] == 4  # two batches of 4 are one step of 8
    assert ternc.report(ternc.quantize(made)).rewritten


def test_advanced_usage(tmp_path):
    config = bitnet_v3.BitNetV3Config(
        **SMALL,
        mpq_stages=[
            {"epochs": 20, "bits": 8},
            {"epochs": 20, "bits": 4},
            {"epochs": 15, "bits": 2},
            {"epochs": 15, "bits": 1.58},
        ],
        adaptive_hadamard=True,
        hadamard_learnable_scale=True,
        knowledge_distillation=True,
        gakd_alpha=0.7,
        gakd_beta=0.2,
        gakd_gamma=0.1,
        dynamic_regularization=True,
        qap_initial_lambda=0.1,
        enhanced_ste=True,
        ste_momentum=0.9,
    )
    student = bitnet_v3.BitNetV3Model(config)
    trainer = bitnet_v3.BitNetV3Trainer(student, config, output_dir=tmp_path)
    trainer.set_teacher_model(bitnet_v3.BitNetV3Model(config, prepared=False))
    rows = trainer.train(batches(), batches(), num_epochs=8, save_every=4, eval_every=2)
    assert {"kl", "gradient", "feature", "penalty"} <= set(rows[-2])
    assert sum("validation_loss" in row for row in rows) == 4
    assert (tmp_path / "epoch-4").is_dir() and (tmp_path / "log.csv").is_file()
    assert all(site.quantizer == "1.58" for site in ternc.sites(student))


def test_modules_of_the_page():
    layer = bitnet_v3.EnhancedHBitLinear(
        in_features=64,
        out_features=48,
        bias=False,
        adaptive_hadamard=True,
        progressive_quantization=True,
    )
    for batch in (7, 3):  # a second batch of another size
        layer(torch.randn(batch, 64)).sum().backward()
    for epoch in range(72):
        layer.set_epoch(epoch)
        assert layer.train()(torch.randn(2, 64)).isfinite().all()
        assert layer.eval()(torch.randn(2, 64)).isfinite().all()
    assert layer.quantizer == "1.58"
    mpq = bitnet_v3.MultiStageProgressiveQuantizer(
        stages=[8, 4, 2, 1.58], stage_epochs=[20, 20, 15, 15]
    )
    w = torch.randn(16, 64, requires_grad=True)
    errors = []
    for epoch in (0, 19, 39, 54, 70):
        mpq.set_epoch(epoch)
        errors.append((mpq(w) - w).norm().item())
    assert errors == sorted(errors) and errors[0] == 0
    mpq(w).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    assert set(
        bitnet_v3.AdaptiveHadamardTransform(size=64, learnable_params=True).state_dict()
    ) == {
        "scale",
        "shift",
    }
    x = torch.randn(3, 64)
    transform = bitnet_v3.AdaptiveHadamardTransform(
        size=x.size(-1), learnable_scale=True, learnable_shift=True
    )
    assert torch.equal(transform(x), bitnet_v3.hadamard_transform(x))
    scheduler = bitnet_v3.MPQScheduler(
        stages=[
            {"start_epoch": 1, "end_epoch": 20, "bits": 8},
            {"start_epoch": 21, "end_epoch": 40, "bits": 4},
            {"start_epoch": 41, "end_epoch": 55, "bits": 2},
            {"start_epoch": 56, "end_epoch": 70, "bits": 1.58},
        ],
        temperature_schedule="linear",
    )
    assert [scheduler.get_bits(e) for e in (0, 25, 45, 60)] == [8, 4, 2, 1.58]
    assert bitnet_v3.create_mpq_schedule([8, 1.58], [1, 1]).get_bits(1.5) == 1.58
    assert bitnet_v3.create_bitlinear_layer(8, 4)(torch.randn(2, 8)).shape == (2, 4)


def test_distillation_of_the_page():
    gakd = bitnet_v3.GradientAwareKnowledgeDistillation(alpha=0.7, beta=0.2, gamma=0.1)
    student, teacher = (torch.randn(2, 5, 11, requires_grad=True) for _ in range(2))
    features = {"a": torch.randn(2, 5, 8, requires_grad=True)}, {"a": torch.randn(2, 5, 8)}
    weight = torch.randn(8, 8, requires_grad=True)
    gradients = torch.autograd.grad((weight @ weight).sin().sum(), weight, create_graph=True)
    loss = gakd(student, teacher, *features, gradients, [torch.randn(8, 8)])
    loss.backward()
    for tensor in (student, features[0]["a"], weight):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert teacher.grad is None
    assert gakd(student, student) == 0
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    other = student.detach().clone()
    other[0, 2:] += 100
    assert torch.equal(
        gakd(student.detach(), teacher, attention_mask=mask),
        gakd(other, teacher, attention_mask=mask),
    )


def test_fine_tuning(tmp_path):
    model(**PLAIN).save_pretrained(tmp_path / "model")
    loaded = bitnet_v3.BitNetV3Model.from_pretrained(tmp_path / "model")
    student = bitnet_v3.convert_to_bitnet_v3(loaded, enable_all_features=True)
    trainer = bitnet_v3.create_trainer(student, batch_size=4)
    trainer.set_teacher_model(loaded)
    trainer.train(batches(), num_epochs=2)
    floating = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    converted = bitnet_v3.convert_to_bitnet_v3(floating)
    x = torch.randn(4, 32)
    assert len(ternc.sites(converted)) == 2
    assert (converted(x) - floating(x)).norm() < 0.02 * floating(x).norm()  # 8-bit inputs
    plain = bitnet_v3.replace_linear_with_bitlinear(floating)
    assert plain is floating and all(s.quantizer == "1.58" for s in ternc.sites(plain))


def test_teachers(tmp_path):
    student = model()
    trainer = bitnet_v3.BitNetV3Trainer(student)
    teacher = bitnet_v3.BitNetV3Model(student.config, prepared=False)
    ids = data(2)
    expected = teacher.eval()(ids).logits
    teacher.save_pretrained(tmp_path / "teacher")
    for given in (teacher, tmp_path / "teacher", teacher.state_dict()):
        trainer.set_teacher_model(given)
        assert torch.equal(trainer.teacher_model.eval()(ids).logits, expected)
    (tmp_path / "teacher.pth").write_bytes(b"x")
    with pytest.raises(TrainingError, match="pickled"):
        trainer.set_teacher_model(tmp_path / "teacher.pth")


def test_save_and_load_are_exact_in_the_middle_of_a_schedule(tmp_path):
    student = model()
    ids = data(2)
    for epoch in (0.0, 30.0, 48.3, 70.0):
        bitnet_v3.MPQScheduler().set_epoch(student, epoch)
        student.save_pretrained(tmp_path / "m")
        loaded = bitnet_v3.BitNetV3Model.from_pretrained(tmp_path / "m")
        for made in (student, loaded):
            made.eval()
        assert torch.equal(loaded(ids).logits, student(ids).logits)
        assert loaded.lm_head.weight is loaded.embeddings.weight
    packed = ternc.quantize(student)
    packed.save_pretrained(tmp_path / "packed")
    again = bitnet_v3.BitNetV3ForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(ids).logits, packed(ids).logits)
    assert not list(tmp_path.rglob("*.bin"))
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**values, "architecture": "else"}))
    with pytest.raises(CheckpointError, match="not of a"):
        bitnet_v3.BitNetV3Model.from_pretrained(tmp_path / "m")


def test_perplexity_is_of_tokens():
    made = model()
    ids = data(6)
    ids_b = {"input_ids": ids[4:], "labels": ids[4:].clone()}
    ids_b["labels"][:, 5:] = -100
    with torch.no_grad():
        made.eval()
        log = made(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = -torch.cat((log[:4].flatten(), log[4:, :4].flatten())).mean()
    ppl = bitnet_v3.compute_perplexity(made, [ids[:4], ids_b])
    assert ppl == pytest.approx(expected.exp().item(), rel=1e-3)


def test_efficiency_is_measured():
    student = bitnet_v3.create_model(**{**SMALL, "hidden_size": 128, "vocab_size": 16}, **PLAIN)
    baseline = bitnet_v3.BitNetV3Model(student.config, prepared=False)
    metrics = bitnet_v3.compute_efficiency_metrics(student, baseline, data(1) // 8, rounds=3)
    assert metrics["speedup"] == metrics["baseline_seconds"] / metrics["bitnet_seconds"]
    assert 80 < metrics["memory_reduction"] < 95
    assert metrics["baseline_bytes"] == sum(p.nbytes for p in set(baseline.parameters()))


def test_downstream_tasks(tmp_path):
    made = model(vocab_size=256)
    results = bitnet_v3.evaluate_downstream_tasks(made, tasks=["hellaswag", "mmlu", "truthfulqa"])
    assert set(results) == {"hellaswag", "mmlu", "truthfulqa"}
    for result in results.values():
        assert result["count"] == 3 and 0 <= result["accuracy"] <= 1
        assert "sample" in result["source"]
    question = {"prompt": "a", "choices": ["bb", "zz"], "answer": 0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(question) + "\n")

    class Loves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(256))
            self.weight.data[ord("b")] = 5.0

        def forward(self, ids):
            return self.weight.expand(*ids.shape, 256)

    found = bitnet_v3.evaluate_downstream_tasks(Loves(), ["mine"], data=tmp_path)
    assert found["mine"]["accuracy"] == 1.0 and found["mine"]["chance"] == 0.5
    with pytest.raises(InputError, match="vocabulary of 64; give tokenize="):
        bitnet_v3.evaluate_downstream_tasks(model())
    with pytest.raises(ConfigError, match="no sample"):
        bitnet_v3.evaluate_downstream_tasks(made, ["else"])


def test_functions_of_core():
    w = torch.randn(16, 256, requires_grad=True)
    errors = [
        ((quantize_weights(w, bits) - w).norm() / w.norm()).item() for bits in (16, 8, 4, 2, 1.58)
    ]
    assert errors == sorted(errors) and errors[1] < 0.01
    quantize_weights(w, 1.58).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
    x = torch.randn(4, 256)
    eight, four = (((quantize_activations(x, b) - x).norm() / x.norm()).item() for b in (8, 4))
    assert eight < 0.012 < four < 0.13
    with pytest.raises(ConfigError, match="bits=3"):
        quantize_weights(w, 3)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 96, 768])
def test_hadamard_transform(size):
    x = torch.randn(5, size)
    y = bitnet_v3.hadamard_transform(x)
    assert torch.allclose(bitnet_v3.hadamard_transform(y), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    block = size & -size
    dense = torch.ones(1, 1)
    while len(dense) < block:
        dense = torch.cat((torch.cat((dense, dense), 1), torch.cat((dense, -dense), 1)))
    expected = (x.view(5, -1, block) @ dense / block**0.5).view(5, size)
    assert torch.allclose(y, expected, atol=1e-5)
