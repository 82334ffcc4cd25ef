"""Stages in three spellings -> the same schedule; blends that begin at 0 and end at 1 exactly."""

import itertools
import math

import pytest
from training import loader, tiny_model

import ternc
from ternc.errors import ConfigError
from ternc.formats.blend import ACTIVATION_BITS
from ternc.train import TrainConfig, Trainer, prepare
from ternc.train.callbacks import TrainingHooks
from ternc.train.schedule import BlendState, Schedule, Stage, blend_at

SPELLINGS = {
    "lengths": {
        "stages": [
            {"epochs": 20, "bits": 8},
            {"epochs": 20, "bits": 4},
            {"epochs": 15, "bits": 2},
            {"epochs": 15, "bits": 1.58},
        ]
    },
    "first and last epoch": {
        "stages": [
            {"start_epoch": 1, "end_epoch": 20, "bits": 8},
            {"start_epoch": 21, "end_epoch": 40, "bits": 4},
            {"start_epoch": 41, "end_epoch": 55, "bits": 2},
            {"start_epoch": 56, "end_epoch": 70, "bits": 1.58},
        ]
    },
    "two lists": {"stages": [8, 4, 2, 1.58], "stage_epochs": [20, 20, 15, 15]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("temperature", ["linear", "cosine"])
def test_three_spellings_are_one_schedule(spelling, temperature):
    schedule = Schedule(**SPELLINGS[spelling], temperature=temperature)
    assert schedule == Schedule(**SPELLINGS["lengths"], temperature=temperature)
    assert schedule.length == 70
    assert schedule.formats == (16, 8, 4, 2, 1.58)
    for start, source, target in ((0, 16, 8), (20, 8, 4), (40, 4, 2), (55, 2, 1.58)):
        assert schedule.at(start) == BlendState(source, target, 0.0)
    assert schedule.at(70) == schedule.at(1000) == schedule.final == BlendState(1.58, 1.58, 1.0)
    bits = [schedule.at(epoch / 4).target for epoch in range(4 * 72)]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("temperature", ["linear", "cosine"])
def test_blend_rises_from_0_to_1(temperature):
    values = [blend_at(i / 50, temperature) for i in range(51)]
    assert values[0] == 0.0 and values[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(values))
    assert blend_at(0.5, temperature) == pytest.approx(0.5)


def test_literal_mode_is_the_plain_sigmoid():
    for p in (0.0, 0.3, 1.0):
        assert blend_at(p, "linear", "literal") == 1 / (1 + math.exp(-10 * p))
        beta = 5 * (1 + math.cos(math.pi * (1 - p)))
        assert blend_at(p, "cosine", "literal") == pytest.approx(1 / (1 + math.exp(-beta)))
    schedule = Schedule(stages=[8, 1.58], stage_epochs=[1, 1], mode="literal")
    assert schedule.at(1.0).blend == 0.5
    assert schedule.at(5.0).blend < 1.0


def test_ramp_then_pure_quantiser():
    schedule = Schedule(stages=(Stage(16, 4), Stage(1.58, 6, 0.5)), unit="step")
    assert schedule.at(3.9) == BlendState(16, 16, 1.0)
    assert 0 < schedule.at(5.5).blend < 1
    assert schedule.at(7.0) == BlendState(1.58, 1.58, 1.0)
    at_once = Schedule(stages=(Stage(1.58, 1, 0.0),))
    assert at_once.at(0.0) == at_once.final and at_once.formats == (1.58,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": []}, "empty"),
        ({"stages": [3], "stage_epochs": [1]}, "bits=3"),
        ({"stages": [8, 4], "stage_epochs": [1]}, "1 entries for 2 stages"),
        ({"stages": [8, 4]}, "stage_epochs"),
        ({"stages": [{"bits": 8}]}, "neither"),
        ({"stages": [{"bits": 8, "epochs": 1, "heat": 2}]}, "keys"),
        ({"stages": [{"bits": 8, "epochs": 0}]}, "positive"),
        ({"stages": [{"bits": 8, "start_epoch": 2, "end_epoch": 3}]}, "starts at epoch 2"),
        ({"stages": [8, 4], "stage_epochs": [0.7, 0.7], "unit": "fraction"}, "longer than 1"),
        ({"unit": "week"}, "unit='week'"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"mode": "odd"}, "mode='odd'"),
        ({"stages": [2], "stage_epochs": [1], "bits": ACTIVATION_BITS}, "bits=2"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**values)


UNITS = {
    "step": (Stage(8, 6), Stage(1.58, 18)),
    "epoch": (Stage(8, 1), Stage(1.58, 3)),
    "fraction": (Stage(8, 0.25), Stage(1.58, 0.75)),
}


@pytest.mark.parametrize("unit", UNITS)
def test_a_run_follows_its_unit(unit):
    """Four epochs of six steps, in the Trainer and in hooks: the three spellings move alike."""
    config = TrainConfig(schedule=Schedule(stages=UNITS[unit], unit=unit))
    expected = [Schedule(stages=UNITS["step"], unit="step").at(step) for step in range(24)]
    student, seen = prepare(tiny_model(), config), []
    layer = ternc.sites(student)[0].module
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight_state.clone()))
    Trainer(student, progress=False).train(loader(), num_epochs=4)
    hooked = prepare(tiny_model(), config)
    hooks, layer = TrainingHooks(hooked, config), ternc.sites(hooked)[0].module
    for step, state in enumerate(expected):
        hooks.begin_step(step, 24, 6)
        for found in (seen[step], layer.weight_state):
            assert found.tolist() == pytest.approx([state.source, state.target, state.blend])
