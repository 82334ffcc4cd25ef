"""Seventeen things that a package of ternary layers must do: one test each, in a fixed order.

Larger tests of the same behaviour stand in the other files here.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import ternc
import ternc.bitnet_v3 as bitnet_v3
from ternc.bitlinear import BitLinear, convert_linear_to_bitlinear, greedy_ternary_decomposition
from ternc.config import Config
from ternc.formats.blend import uniform
from ternc.modules.linear import TernaryLinear
from ternc.train import (
    Distillation,
    Hadamard,
    Regularization,
    Schedule,
    TrainConfig,
    gradients,
    prepare,
)
from ternc.train.distill import Distiller
from ternc.train.regularize import Penalty
from ternc.train.task import cross_entropy, example_of

ROOT = Path(__file__).parents[2]
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
PAGE = Schedule(stages=[8, 4, 2, 1.58], stage_epochs=[20, 20, 15, 15])


def language_model(**changes):
    return bitnet_v3.BitNetV3Model(bitnet_v3.BitNetV3Config(**{**SMALL, **changes}))


def ids(count=4, length=10):
    return torch.randint(64, (count, length))


def test_01_packed_bytes():
    layer = BitLinear(512, 512, bias=False).pack()
    state = layer.state_dict()
    assert state["trits"].dtype == torch.uint8
    assert 8 * sum(t.untyped_storage().nbytes() for t in state.values()) / 512**2 <= 1.65
    from safetensors.torch import save

    assert 8 * len(save({k: v.contiguous() for k, v in state.items()})) / 512**2 <= 1.65


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_02_every_converted_layer_is_called(mode, training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = convert_linear_to_bitlinear(nn.TransformerEncoder(layer, 1)).train(training)
    calls = []
    packed = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    for module in packed:
        module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    with mode():
        model(torch.randn(2, 5, 32))
    assert len(packed) == 6 and sorted(calls) == sorted(map(id, packed))


def test_03_eight_bits_are_eight_bits():
    w = torch.randn(16, 256)
    values = uniform(w, 8)
    codes = (values / (w.abs().amax(1, keepdim=True) / 127)).round()
    assert codes.unique().numel() > 200
    assert (values - w).norm() / w.norm() < 0.01


def test_04_fast_transform_is_the_dense_one():
    for size in (1, 2, 64, 1024, 4096, 96, 768):
        x = torch.randn(2, size)
        block = size & -size
        dense = torch.ones(1, 1)
        while len(dense) < block:
            dense = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), dense)
        expected = (x.view(2, -1, block) @ (dense / block**0.5)).view(2, size)
        found = bitnet_v3.hadamard_transform(x)
        assert (found - expected).abs().max() < 1e-5
        assert (bitnet_v3.hadamard_transform(found) - x).abs().max() < 1e-5


def test_05_conversion_is_an_identity_at_full_precision():
    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10))
    config = TrainConfig(
        weights=Config(planes=1, activation_bits=None), schedule=PAGE, hadamard=Hadamard(("*",))
    )
    x = torch.randn(8, 96)
    assert (prepare(model, config)(x) - model(x)).abs().max() < 1e-5


def test_06_every_epoch_runs():
    model, batch = language_model(), ids()
    scheduler = bitnet_v3.MPQScheduler()
    for epoch in range(72):
        scheduler.set_epoch(model, epoch)
        loss = model.train()(batch, labels=batch).loss
        loss.backward()
        assert loss.isfinite()
        with torch.no_grad():
            assert model.eval()(batch).logits.isfinite().all()
    assert {site.quantizer for site in ternc.sites(model)} == {"1.58"}


@pytest.mark.parametrize("epoch", [0, 30, 48, 60, 70])
def test_07_gradient_is_the_dense_one(epoch):
    w = torch.randn(16, 64, requires_grad=True)
    quantizer = bitnet_v3.MultiStageProgressiveQuantizer()
    quantizer.set_epoch(epoch)
    direction = torch.randn(16, 64)
    (quantizer(w) * direction).sum().backward()
    cosine = nn.functional.cosine_similarity(w.grad.flatten(), direction.flatten(), dim=0)
    assert cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_08_a_second_batch_of_another_size():
    config = bitnet_v3.BitNetV3Config(**SMALL, knowledge_distillation=False)
    trainer = bitnet_v3.BitNetV3Trainer(bitnet_v3.BitNetV3Model(config), config)
    rows = trainer.train([ids(4), ids(3), ids(1, 5)], num_epochs=2, eval_every=None)
    assert rows[-1]["step"] == 6


def test_09_every_term_has_a_true_gradient():
    """KL, feature, weight-gradient and DR-QAP terms, along a random direction, by differences."""
    torch.manual_seed(0)
    config = TrainConfig(
        weights=Config(planes=1, activation_bits=None),
        schedule=Schedule(stages=[16, 1.58], stage_epochs=[1, 1]),
    )
    student = prepare(language_model_float(), config)
    teacher, batch = language_model_float(), ids()
    example = example_of({"input_ids": batch, "labels": batch})
    distiller = Distiller(student, teacher, Distillation(alpha=1.0, gamma=1.0))

    def task(model):
        return cross_entropy(model(batch), {"input_ids": batch, "labels": batch})

    def terms():
        return distiller.terms(student(batch), example)

    target = gradients.teacher_gradients(student, teacher, task)

    def alignment():
        return gradients.alignment(gradients.effective_gradients(student, task), target)

    weight = ternc.sites(student)[0].weight
    direction = torch.randn_like(weight)
    for name, value in (
        ("kl", lambda: terms()["kl"]),
        ("feature", lambda: terms()["feature"]),
        ("weights", alignment),
    ):
        student.zero_grad()
        if name == "weights":
            gradients.add_alignment_gradient(student, task, target, 1.0)
        else:
            value().backward()
        slope = (weight.grad * direction).sum().item()
        assert slope != 0 and weight.grad.isfinite().all()
        assert slope == pytest.approx(difference(value, weight, direction), rel=0.05), name
    layer = prepare(nn.Sequential(nn.Linear(64, 8)), TrainConfig())
    (site,) = ternc.sites(layer)
    site.weight.grad = torch.zeros_like(site.weight)
    Penalty([site], Regularization()).add_gradient([site], 1.0)
    direction = torch.randn_like(site.weight)
    slope = (site.weight.grad * direction).sum().item()
    expected = difference(
        # A step within one fp16 value of the scale; the codes are the same on both sides.
        lambda: (site.weight.double() - site.values().double()).square().mean(),
        site.weight,
        direction,
        step=1e-5,
    )
    assert slope != 0 and slope == pytest.approx(expected, rel=0.05)


def difference(value, weight, direction, step=1e-3):
    found = []
    for sign in (1, -1):
        weight.data.add_(direction, alpha=sign * step)
        found.append(value().item())
        weight.data.add_(direction, alpha=-sign * step)
    return (found[0] - found[1]) / (2 * step)


def language_model_float():
    return bitnet_v3.BitNetV3Model(bitnet_v3.BitNetV3Config(**SMALL), prepared=False)


@pytest.mark.parametrize("epoch", [0.0, 33.0, 58.5, 70.0])
def test_10_save_and_load_in_the_middle_of_a_schedule(tmp_path, epoch):
    model, batch = language_model(), ids()
    bitnet_v3.MPQScheduler().set_epoch(model, epoch)
    model.save_pretrained(tmp_path)
    loaded = bitnet_v3.BitNetV3Model.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(batch).logits, model.eval()(batch).logits)


def test_11_cached_decoding_is_uncached_decoding():
    model, batch = language_model(activation_bits=None).eval(), ids()
    with torch.no_grad():
        whole = model(batch).logits
        output = model(batch[:, :1], use_cache=True)
        for t in range(1, batch.shape[1]):
            output = model(
                batch[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True
            )
            assert (output.logits[:, 0] - whole[:, t]).abs().max() < 1e-5


def test_12_left_padding_is_finite():
    model, batch = language_model().eval(), ids()
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    assert model(batch, mask).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gauss", "uniform", "laplace", "student"])
def test_13_error_falls_with_every_plane(name):
    w = {
        "gauss": lambda: torch.randn(32, 1024),
        "uniform": lambda: torch.rand(32, 1024) * 2 - 1,
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((32, 1024)),
        "student": lambda: torch.distributions.StudentT(4.0).sample((32, 1024)),
    }[name]()
    errors = []
    for k in range(1, 6):
        planes, gammas = greedy_ternary_decomposition(w, k)
        errors.append((((gammas[..., None] * planes).sum(0) - w).norm() / w.norm()).item())
    assert errors == sorted(errors, reverse=True)
    if name == "gauss":
        assert errors[1] <= 0.18 and errors[2] <= 0.07


def test_14_every_field_of_the_configuration_is_perturbed():
    """The perturbations themselves are test_bitnet_v3_config.py's; none may be forgotten there."""
    source = (Path(__file__).parent / "test_bitnet_v3_config.py").read_text()
    for name in bitnet_v3.BitNetV3Config.__dataclass_fields__:
        assert f'    "{name}": ' in source


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


README_NAMES = """
import copy
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
x, skeleton = torch.randn(4, 32), copy.deepcopy(model)
batches = [torch.randn(8, 32) for _ in range(4)]
plain = torch.compile
def quick(model, backend, **options):
    more = {"options": {"inner": "eager"}} if backend == "ternc" else {}
    return plain(model, backend=backend, **options, **more)
torch.compile = quick
"""
"""What the first block of README.md takes for granted."""


def test_15_snippets_of_the_documentation_run(tmp_path):
    """Every Python block of docs/training.md and README.md."""
    blocks = python_blocks(ROOT / "docs" / "training.md")
    assert len(blocks) >= 5
    first, training = python_blocks(ROOT / "README.md")
    blocks += [training, README_NAMES, first]
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_16_a_schedule_moves_without_recompilation():
    torch._dynamo.reset()
    model = prepare(
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)),
        TrainConfig(schedule=PAGE, hadamard=Hadamard(("*",))),
    )
    compiled = torch.compile(model, backend="ternc", fullgraph=True, options={"inner": "aot_eager"})
    x = torch.randn(4, 64)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(0, 72, 3):
            bitnet_v3.MPQScheduler().set_epoch(model, epoch)
            compiled(x).sum().backward()


def test_17_torch_is_enough():
    """Nothing but torch and the light libraries of the package is imported by training."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.match(r"[\w-]+", name).group() for name in needed} == {
        "torch",
        "networkx",
        "tabulate",
        "safetensors",
    }
    script = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'tqdm', 'datasets', 'accelerate', 'pandas',\n"
        "             'torchvision', 'wandb', 'bitsandbytes', 'omegaconf', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "import torch, ternc.bitlinear, ternc.bitnet_v3 as b\n"
        "m = b.create_model(vocab_size=16, hidden_size=16, num_layers=1, num_heads=2)\n"
        "b.create_trainer(m, enable_gakd=False).train([torch.randint(16, (2, 5))], num_epochs=1)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
