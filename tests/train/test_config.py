"""Every field of `TrainConfig` and of its parts changes what a short run leaves behind."""

import dataclasses
import functools

import pytest
import torch
from training import loader, tiny_model

import ternc
from ternc.train import (
    Distillation,
    Hadamard,
    Momentum,
    Optimization,
    Regularization,
    Schedule,
    TrainConfig,
    Trainer,
)

BASE = TrainConfig(
    schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 1]),
    activation_schedule=Schedule(stages=[8], stage_epochs=[1]),
    hadamard=Hadamard(),
    dead_zone=1e-3,
    distillation=Distillation(alpha=0.7, beta=0.2, gamma=0.1, temperature=2.0),
    regularization=Regularization(strength=1e4),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
)

CHANGES = {
    "weights": ternc.Config(planes=1, group_size=16),
    "scale": "absmean",
    "schedule": None,
    "activation_schedule": None,
    "hadamard": None,
    "dead_zone": 0.0,
    "distillation": None,
    "regularization": None,
    "momentum": None,
    "optimization": Optimization(learning_rate=3e-3, betas=(0.5, 0.5)),
    "accumulate": 2,
    "autocast": "bfloat16",
}

PARTS = {
    "hadamard": {"layers": ("*down",), "learn_scale": False, "learn_shift": False},
    "distillation": {
        "alpha": 0.1,
        "beta": 0.9,
        "gamma": 0.9,
        "task": 0.5,
        "temperature": 1.0,
        "gradient": "hvp",
        "feature_layers": 2,
        "balance": True,
        "ignore_index": ord("e"),
    },
    "regularization": {
        "strength": 1e3,
        "schedule": "constant",
        "share": 0.9,
        "sensitivity": False,
        "momentum": 0.1,
    },
    "momentum": {"momentum": 0.1, "power": 1.0},
    "optimization": {
        "name": "muon",
        "learning_rate": 1e-3,
        "hadamard_learning_rate": 1e-5,
        "betas": (0.5, 0.5),
        "weight_decay": 0.0,
        "schedule": "cosine",
        "phase_two": 0.1,
        "warm_up": 0.3,
        "clip": 0.1,
    },
}

NEEDED = {
    ("distillation", "balance_target"): (0.1, {"balance": True}),
    ("regularization", "rate"): (0.1, {"schedule": "decay"}),
    ("optimization", "warm_down"): (0.9, {"schedule": "wsd"}),
}
"""Fields that count only beside another: (value, the others)."""


@functools.cache
def outcome(config):
    torch.manual_seed(0)
    teacher, model = tiny_model(layers=1), tiny_model(layers=1)
    trainer = Trainer(model, config, teacher, progress=False)
    trainer.train(loader(count=12), num_epochs=2)
    return [p.double().norm().item() for p in model.parameters()]


def with_part(part, **changes):
    return BASE.replace(**{part: dataclasses.replace(getattr(BASE, part), **changes)})


@pytest.mark.parametrize("name", CHANGES)
def test_every_field(name):
    assert outcome(BASE.replace(**{name: CHANGES[name]})) != outcome(BASE)


@pytest.mark.parametrize("part, name", [(p, n) for p, fields in PARTS.items() for n in fields])
def test_every_field_of_a_part(part, name):
    assert outcome(with_part(part, **{name: PARTS[part][name]})) != outcome(BASE)


@pytest.mark.parametrize("part, name", NEEDED)
def test_fields_that_need_others(part, name):
    value, others = NEEDED[part, name]
    assert outcome(with_part(part, **others, **{name: value})) != outcome(with_part(part, **others))


def test_no_field_is_forgotten():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == set(CHANGES)
    for part, fields in PARTS.items():
        own = {field.name for field in dataclasses.fields(getattr(BASE, part))}
        rest = {name for other, name in NEEDED if other == part}
        assert own - set(fields) - rest == ({"cache"} if part == "distillation" else set())
