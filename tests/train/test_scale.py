"""Learnt scales: LSQ's gradient, what is packed, resuming, tied weights."""

import pytest
import torch
from torch import nn
from training import loader, tiny_model, windows

import ternc
from ternc.config import CODE_MAX
from ternc.errors import ConfigError
from ternc.formats.quantized import expand_groups
from ternc.train import Hadamard, Optimization, TrainConfig, Trainer, preset
from ternc.train.quantizers import ternary
from ternc.train.scale import LearntScale

pytestmark = pytest.mark.usefixtures("register_ops")


@pytest.mark.parametrize("planes, group", [(1, 16), (2, 0), (3, 16), (1, -1)])
def test_gradient_is_that_of_a_straight_through_round(planes, group):
    w = torch.randn(6, 40, requires_grad=True)
    learnt = LearntScale(ternary(w, planes, group, "fit"))
    with torch.no_grad():
        learnt.factor.mul_(torch.rand_like(learnt.factor) + 0.5)
    cotangent = torch.randn(6, 40)
    learnt(w).backward(cotangent)

    factor = learnt.factor.detach().clone().requires_grad_(True)
    quantized = learnt.quantized(w)
    # The stored scale is a rounding of start * factor; the gradient takes it for that.
    step = quantized.scale[:, None] * (factor / factor.detach())[:, None]
    if group > 0:
        step = step * expand_groups(quantized.multiplier.float(), group, 40)
    u, most = w.detach() / step, CODE_MAX[planes]
    u = u.clamp(-most - 0.5, most + 0.5)
    rounded = (u + (u.round() - u).detach()).clamp(-most, most)
    (rounded * step).backward(cotangent)
    expected = factor.grad * (40 * most) ** -0.5
    torch.testing.assert_close(learnt.factor.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(w.grad, cotangent)
    torch.testing.assert_close(learnt(w), quantized.dequantize(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hadamard", [None, Hadamard()])
def test_what_is_learnt_is_packed(hadamard, tmp_path):
    torch.manual_seed(0)
    config = TrainConfig(
        scale="learnt", hadamard=hadamard, optimization=Optimization(learning_rate=1e-2)
    )
    trainer = Trainer(tiny_model(), config, progress=False, folder=tmp_path, log_every=1)
    rows = trainer.train(loader(), num_epochs=4, save_every=2)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    factors = [site.module.learnt_scale.factor for site in trainer.sites]
    assert all((factor - 1).abs().max() > 1e-3 for factor in factors)
    assert all(not group["weight_decay"] for group in trainer.optimizers[0].param_groups[1:])
    packed, ids = ternc.quantize(trainer.inner.eval()), windows(4)[:, :-1]
    with torch.no_grad():
        assert torch.equal(packed(ids), trainer.inner(ids))
    again = Trainer(tiny_model(), config, progress=False, log_every=1)
    resumed = again.train(loader(), num_epochs=4, resume=tmp_path / "epoch-2")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]


def test_tied_weights_share_their_scales():
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    model[1].weight = model[0].weight
    student = ternc.train.prepare(model, TrainConfig(scale="learnt"))
    assert student[0].learnt_scale is student[1].learnt_scale


def test_a_schedule_is_refused():
    with pytest.raises(ConfigError, match="has no schedule"):
        preset("warm_start", scale="learnt")
