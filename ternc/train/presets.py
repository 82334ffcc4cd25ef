"""Named recipes: `preset("warm_start")` -> TrainConfig.

    bitnet_b158    mean-magnitude scales per tensor, ternary from the first step (arXiv 2402.17764)
    modern         mean-magnitude scales in groups of 128, flat learning rate with a warm-down
    warm_start     modern, floating point for the first 40 % of the steps, then a ramp over 10 %
    stages         modern, 8 -> 4 -> 2 -> 1.58 bits
    full           warm_start with the teacher's KL

What each part is worth is measured by benchmarks/ablation.py (docs/training.md has the table): a
part belongs to a preset if it gains two deviations of seeds, as the warm start does (without a
teacher) and the KL. Groups and the flat rate gain nothing by themselves; they are what the other
parts were measured on. All other techniques are fields of `TrainConfig` that no preset sets.

`warm_start` is the recommendation where there is no teacher: the shape of 16 -> 1.58 continual
training (ACL Findings 2025), of which the seed's four stages are a slow variant. A model that was
trained already is better converted with `TrainConfig()`, whose scales are of least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ternc.config import Config
from ternc.errors import ConfigError
from ternc.formats.blend import FLOAT, TERNARY
from ternc.train.config import Distillation, Optimization, TrainConfig
from ternc.train.schedule import Schedule, Stage

WARM_START = Schedule(stages=(Stage(FLOAT, 0.4, 0.0), Stage(TERNARY, 0.6, 1 / 6)), unit="fraction")
"""40 % floating point, a ramp over 10 %, 50 % ternary."""

STAGES = Schedule(
    stages=(Stage(8, 0.2), Stage(4, 0.2), Stage(2, 0.2), Stage(TERNARY, 0.4)), unit="fraction"
)


def _bitnet_b158() -> TrainConfig:
    return TrainConfig(weights=Config(planes=1, group_size="tensor"), scale="absmean")


def _modern() -> TrainConfig:
    return TrainConfig(scale="absmean", optimization=Optimization(schedule="wsd", weight_decay=0.0))


def _warm_start() -> TrainConfig:
    return _modern().replace(schedule=WARM_START)


def _stages() -> TrainConfig:
    return _modern().replace(schedule=STAGES)


def _full() -> TrainConfig:
    return _warm_start().replace(distillation=Distillation())


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "bitnet_b158": _bitnet_b158,
    "modern": _modern,
    "warm_start": _warm_start,
    "stages": _stages,
    "full": _full,
}


def preset(name: str = "warm_start", **changes: Any) -> TrainConfig:
    """The configuration of a named recipe, with other values in some fields.

    Raises:
        ConfigError: no such recipe.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]().replace(**changes)
