"""What happens between backward and the optimiser: DR-QAP, ESTE-M, rates, groups, logs."""

import math

import pytest
import torch
from torch import nn
from training import loader, tiny_model

import ternc
from ternc.errors import MissingExtraError
from ternc.train import (
    Hadamard,
    Momentum,
    Optimization,
    Regularization,
    Schedule,
    TrainConfig,
    Trainer,
    finish,
    prepare,
)
from ternc.train.log import plot_curves
from ternc.train.metrics import TritMonitor
from ternc.train.momentum import MomentumTransform
from ternc.train.optimizer import learning_rate_factor, make_optimizers, weight_decay_factor
from ternc.train.regularize import Penalty


def one_layer(**changes):
    model = nn.Sequential(nn.Linear(64, 8))
    return prepare(model, TrainConfig(**{"weights": ternc.Config(planes=1), **changes}))


@pytest.mark.parametrize("hadamard", [None, Hadamard(("*",))])
def test_penalty_gradient_is_true_for_least_squares_scales(hadamard):
    model = one_layer(hadamard=hadamard)
    (site,) = ternc.sites(model)
    site.weight.grad = torch.zeros_like(site.weight)
    penalty = Penalty([site], Regularization())
    value = penalty.add_gradient([site], 0.1)
    assert value > 0

    def distance():
        layer = site.module
        return 0.1 * (layer.matrix() - layer.values()).square().mean()

    for index in (3, 100, 511):
        flat = site.weight.data.view(-1)
        old, step = flat[index].item(), 1e-3
        flat[index] = old + step
        up = distance().item()
        flat[index] = old - step
        down = distance().item()
        flat[index] = old
        numeric = (up - down) / (2 * step)
        assert site.weight.grad.view(-1)[index].item() == pytest.approx(numeric, rel=0.05, abs=2e-6)


def test_penalty_pulls_to_the_current_quantiser():
    model = one_layer(schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 1]))
    (site,) = ternc.sites(model)
    errors = []
    for progress in (0.8, 2.0):
        ternc.train.set_schedule(
            model, Schedule(stages=[8, 1.58], stage_epochs=[1, 1]).at(progress)
        )
        site.weight.grad = torch.zeros_like(site.weight)
        errors.append(Penalty([site], Regularization()).add_gradient([site], 1.0).item())
    assert errors[0] < 1e-3 * errors[1]


def test_penalty_strength_over_a_run():
    ramp = Penalty([], Regularization(strength=0.2, schedule="ramp", share=0.25))
    assert [ramp.strength(f, 0) for f in (0.0, 0.75, 1.0)] == [0.0, 0.0, 0.2]
    decay = Penalty([], Regularization(strength=0.1, schedule="decay"))
    assert decay.strength(0.5, 20) == pytest.approx(0.1 * 0.95**20)
    assert Penalty([], Regularization(schedule="constant")).strength(0.1, 9) == 0.1


def test_sensitivities_sum_to_one_and_follow_gradients():
    model = prepare(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8)))
    found = ternc.sites(model)
    found[0].weight.grad = torch.full_like(found[0].weight, 3.0)
    found[1].weight.grad = torch.full_like(found[1].weight, 1.0)
    penalty = Penalty(found, Regularization(momentum=0.9))
    assert penalty.weights().tolist() == [0.5, 0.5]
    penalty.observe(found)
    assert penalty.weights().tolist() == pytest.approx([0.75, 0.25])
    found[0].weight.grad.zero_()
    penalty.observe(found)
    assert penalty.weights().tolist() == pytest.approx([2.7 / 3.7, 1 / 3.7])
    assert not [p for p in model.parameters() if p.dim() == 1 and p.grad is not None]


def test_plain_momentum_settings_change_nothing():
    model = one_layer()
    found = ternc.sites(model)
    found[0].weight.grad = torch.randn_like(found[0].weight)
    before = found[0].weight.grad.clone()
    MomentumTransform(Momentum(momentum=0.0, power=1.0)).apply(found)
    assert torch.equal(found[0].weight.grad, before)


def test_momentum_keeps_the_norm_and_is_saved():
    model = one_layer()
    found = ternc.sites(model)
    transform, other = MomentumTransform(Momentum()), MomentumTransform(Momentum())
    for turn in range(3):
        gradient = torch.randn_like(found[0].weight)
        found[0].weight.grad = gradient.clone()
        if turn == 2:
            other.load_state_dict(transform.state_dict())
        transform.apply(found)
        result = found[0].weight.grad.clone()
    average = transform.averages[found[0].name] / (1 - 0.9**3)
    assert result.norm().item() == pytest.approx(average.norm().item(), rel=1e-5)
    assert torch.equal(result.sign(), average.sign())
    found[0].weight.grad = gradient.clone()
    other.apply(found)
    assert torch.equal(found[0].weight.grad, result)


def test_two_phase_rates():
    config = Optimization(schedule="two_phase", warm_up=0.1)
    rates = [learning_rate_factor(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0
    assert rates[49] == pytest.approx(1 - 0.98 / 3) and rates[50] == pytest.approx(2 / 3)
    assert rates[100] == pytest.approx(0.0)
    assert [weight_decay_factor(config, s, 100) for s in (0, 49, 50, 99)] == [1, 1, 0, 0]
    flat = Optimization(schedule="wsd", warm_up=0.01, warm_down=0.2)
    assert learning_rate_factor(flat, 79, 100) == 1.0
    assert learning_rate_factor(flat, 90, 100) == pytest.approx(0.5)
    half = learning_rate_factor(Optimization(schedule="cosine", warm_up=0.01), 50, 100)
    assert half == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name):
    model = prepare(tiny_model(), TrainConfig(hadamard=Hadamard()))
    config = Optimization(name=name, hadamard_learning_rate=1e-5, weight_decay=0.3)
    optimizers = make_optimizers(model, config)
    assert len(optimizers) == (2 if name == "muon" else 1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    layer = model.blocks[0].attention.out
    assert rates[id(layer.hadamard_scale)] == rates[id(layer.hadamard_shift)] == (1e-5, 0.0)
    assert rates[id(layer.weight)] == (1e-3, 0.3)
    assert rates[id(model.norm.weight)][1] == rates[id(model.embedding.weight)][1] == 0.0
    if name == "muon":
        assert type(optimizers[0]) is torch.optim.Muon
        assert len(optimizers[0].param_groups[0]["params"]) == len(ternc.sites(model))


def test_muon_trains():
    config = TrainConfig(optimization=Optimization(name="muon", learning_rate=1e-2))
    trainer = Trainer(tiny_model(), config, log_every=1, progress=False)
    losses = [row["loss"] for row in trainer.train(loader(), num_epochs=6)]
    assert losses[-1] < 0.7 * losses[0]


def test_dead_zone_bias_reaches_dead_weights_and_is_packed():
    model = one_layer(dead_zone=0.05)
    (site,) = ternc.sites(model)
    x = torch.zeros(3, 64)
    out = model(x)
    dead = site.values() == 0
    expected = model[0].bias + 0.05 * (site.weight * dead).sum(1)
    assert torch.allclose(out, expected.expand(3, 8), atol=1e-6)
    out.sum().backward()
    assert torch.allclose(site.weight.grad, 0.15 * dead.float())
    packed = ternc.quantize(finish(model))
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


def test_monitor_counts_zeros_and_flips():
    model = one_layer()
    found, monitor = ternc.sites(model), TritMonitor()
    first = monitor.look(found)
    codes = found[0].module.quantized().codes
    assert first == {"zero_fraction": (codes == 0).float().mean().item(), "flip_rate": 0.0}
    with torch.no_grad():
        found[0].weight.view(-1)[:16].neg_()
    flips = int((found[0].module.quantized().codes != codes).sum())
    assert flips > 0 and monitor.look(found)["flip_rate"] == pytest.approx(flips / 512)


def test_curves(tmp_path):
    rows = [{"step": i, "epoch": float(i), "loss": 1.0 / (i + 1)} for i in range(5)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match="matplotlib"):
            plot_curves(rows, tmp_path / "curves.png")
        return
    plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
