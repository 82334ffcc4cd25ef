"""Alignment of weight gradients: finite difference and double backward agree; the master weight
would be the wrong thing to perturb."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from training import tiny_model, windows

import ternc
from ternc.errors import DifferentiationError, TrainingError
from ternc.train import (
    Distillation,
    Hadamard,
    Optimization,
    TrainConfig,
    Trainer,
    gradients,
    prepare,
)
from ternc.train.task import cross_entropy

BATCH = windows(4, 17)


def loss(model):
    return cross_entropy(model(BATCH[:, :-1]), BATCH)


@pytest.fixture
def pair():
    torch.manual_seed(2)
    # Floating-point activations: the steps of a quantiser are not differentiable by differences.
    weights = ternc.Config(planes=1, activation_bits=None)
    return prepare(tiny_model(), TrainConfig(weights=weights)), tiny_model()


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_finite_difference_is_the_double_backward(pair):
    student, teacher = pair
    target = gradients.teacher_gradients(student, teacher, loss)
    exact_value = gradients.add_exact_alignment_gradient(student, loss, target, 0.3)
    exact = flat(student)
    student.zero_grad()
    value = gradients.add_alignment_gradient(student, loss, target, 0.3)
    found = flat(student)
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-4)
    assert exact.norm() > 0 and exact.isfinite().all()
    assert (found - exact).norm() / exact.norm() < 5e-3


def test_gradients_are_added_and_nothing_stays(pair):
    student, teacher = pair
    loss(student).backward()
    before = flat(student)
    target = gradients.teacher_gradients(student, teacher, loss)
    gradients.add_alignment_gradient(student, loss, target, 0.3)
    together = flat(student)
    student.zero_grad()
    gradients.add_alignment_gradient(student, loss, target, 0.3)
    assert torch.allclose(together, before + flat(student), rtol=1e-4, atol=1e-6)
    assert all(site.module.offset is None for site in ternc.sites(student))
    assert not any(p.grad is not None for p in teacher.parameters())


def test_a_rotated_site_compares_in_its_own_basis():
    torch.manual_seed(2)
    teacher = tiny_model()
    config = TrainConfig(
        weights=ternc.Config(planes=1, activation_bits=None),
        schedule=ternc.train.Schedule(stages=[16, 1.58], stage_epochs=[1, 1]),
        hadamard=Hadamard(),
    )
    twin = prepare(teacher, config)
    own = gradients.effective_gradients(twin, loss)
    target = gradients.teacher_gradients(twin, teacher, loss)
    assert gradients.alignment(own, target) < 1e-6


@pytest.mark.parametrize("mode", ["logit", "hvp", "exact"])
def test_every_mode_brings_gradients_together(mode):
    torch.manual_seed(2)
    student, teacher = tiny_model(), tiny_model()
    config = TrainConfig(
        distillation=Distillation(alpha=0, task=0.0, beta=1.0, gradient=mode),
        optimization=Optimization(learning_rate=2e-3, schedule="constant"),
    )
    trainer = Trainer(student, config, teacher, log_every=1, progress=False)
    rows = trainer.train([BATCH], num_epochs=12)
    values = [row["gradient"] for row in rows]
    assert values[-1] < 0.9 * values[0]


def test_a_teacher_of_another_shape_is_refused(pair):
    student, _ = pair
    with pytest.raises(TrainingError, match="use gradient='logit'"):
        gradients.teacher_gradients(student, tiny_model(48), loss)
    with pytest.raises(TrainingError, match="no weight of that name"):
        gradients.teacher_gradients(student, nn.Linear(2, 2), loss)


def test_forward_mode_and_torch_func_are_refused():
    model = prepare(nn.Linear(64, 8), TrainConfig()).requires_grad_(False)
    x = torch.randn(3, 64)
    with pytest.raises(DifferentiationError, match=r"QATLinear\(64, 8\) is trained by backward"):
        torch.func.jvp(model, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(DifferentiationError, match="quantize the model"):
        model(forward_ad.make_dual(x, x))
    assert model(x).shape == (3, 8)
