"""The ablation as data: size of the model and the runs, recipe of every arm, order of the jobs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from ablation_data import TUNE

from ternc.config import Config
from ternc.errors import TerncError
from ternc.train import Hadamard, Momentum, Regularization, TrainConfig, preset
from ternc.train.presets import STAGES

FLOAT = TrainConfig(weights=Config(planes=1, exclude=("*",)))
"""No site: the same trainer, data and schedule, nothing quantised."""

RATED = ("float", "bitnet", "full")
"""Arms that get the best of the learning rates; a change of one uses its rate, others `full`'s."""

SHIPPED = {
    "bitnet": "bitnet_b158",
    "modern": "modern",
    "warm_start": "warm_start",
    "full-dead_zone": "full",
}
"""Arm -> the preset of `ternc.train` that is this recipe."""

SEEDED = (*RATED, "full-dead_zone", "warm_start", "modern", "full+muon")
"""Arms with a second seed: what presets hang on, or would."""

LONGER = ("float", "bitnet", "full-dead_zone")
"""Arms that are trained a second time for `Settings.longer` steps."""

PTQ = {"ptq-1": 1, "ptq-2": 2, "ptq-3": 3}
"""The float arm quantised after training, by planes."""

DEAD_ZONE = 1e-3
"""Of `full` here, the recipe put to the test; the preset of that name keeps what helped."""

STRONG = 3e4
"""A penalty whose gradient is a few hundredths of the task's; at 0.1, its default, a millionth."""

COSTLY = ("full+hvp",)
"""Five times the time of a step: run where they are asked for by name."""


def recipes() -> dict[str, TrainConfig]:
    """Trained arm -> configuration, in the order in which they run."""
    full = preset("full", dead_zone=DEAD_ZONE)
    known = full.distillation
    assert known is not None
    bitnet = preset("bitnet_b158")
    return {
        "float": FLOAT.replace(optimization=preset("modern").optimization),
        "bitnet": bitnet,
        "full": full,
        "modern": preset("modern"),
        "warm_start": preset("warm_start"),
        "full-kl": full.replace(distillation=None),
        "full-ramp": full.replace(schedule=None),
        "full-dead_zone": full.replace(dead_zone=0.0),
        "full+stages": full.replace(schedule=STAGES),
        "full+hadamard": full.replace(hadamard=Hadamard()),
        "full+penalty": full.replace(regularization=Regularization()),
        "full+momentum": full.replace(momentum=Momentum()),
        "full+gradient": full.replace(distillation=dataclasses.replace(known, beta=1.0)),
        "full+feature": full.replace(
            distillation=dataclasses.replace(known, gamma=0.1, balance=True)
        ),
        "full+muon": full.replace(optimization=dataclasses.replace(full.optimization, name="muon")),
        "full+strong_penalty": full.replace(regularization=Regularization(strength=STRONG)),
        "float+kl": FLOAT.replace(optimization=full.optimization, distillation=known),
        "bitnet+kl": bitnet.replace(distillation=known),
        "bitnet+kl+ramp": bitnet.replace(distillation=known, schedule=full.schedule),
        "full+hvp": full.replace(distillation=dataclasses.replace(known, beta=0.1, gradient="hvp")),
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and length of every arm."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 1408
    context: int = 1024
    batch: int = 32
    steps: int = 3000
    """98 million bytes, 1.8 passes over the training text."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    controls: tuple[float, ...] = ()
    """Rates tried beside them, to see that the best is no edge. No change of an arm moves to one,
    and the teacher stays: switches are compared at one rate.
    """
    longer: int = 0
    """Steps of the runs of LONGER, at the rates that are best in `steps`; 0 = none."""
    seeds: tuple[int, ...] = (0, 1)
    """The second one for the arms of SEEDED alone."""
    windows: int = 1 << 20
    """Most windows of `context` bytes of each text that are scored."""
    parts: int = 1
    """Passes of the loader, with a checkpoint's random state each."""
    device: str = "cpu"
    compiled: bool = False
    mode: str | None = None
    """Of torch.compile, where steps are timed: "reduce-overhead" replays CUDA graphs."""

    @classmethod
    def smoke(cls) -> Settings:
        """Seconds an arm: guards the order of float, BitNet and ternc."""
        return cls(
            width=64, layers=2, heads=2, hidden=128, context=64, batch=8, steps=120,
            rates=(6e-3, 1e-2), seeds=(0, 1, 2), windows=64,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm at one seed and one learning rate."""

    key: str
    """Name of its files."""
    arm: str
    seed: int
    rate: float | None
    """None = the best rate of `family`."""
    needs: tuple[str, ...] = ()
    """Keys of jobs that end before this one starts."""
    steps: int | None = None
    """None = those of the settings."""

    @property
    def family(self) -> str:
        """The arm whose best rate this one takes."""
        if self.arm in PTQ:
            return "float"
        root = re.split("[-+]", self.arm)[0]
        return root if root in RATED else "full"


def plan(settings: Settings, arms: tuple[str, ...] | None = None) -> list[Job]:
    """Every job in the order in which they start.

    Raises:
        TerncError: an arm that does not exist.
    """
    known = recipes()
    names = [*known, *PTQ]
    if unknown := [name for name in arms or () if name not in names]:
        raise TerncError(f"arms {unknown} are none of {names}")
    chosen = [name for name in names if (name in arms if arms else name not in COSTLY)]
    if arms:
        chosen.sort(key=arms.index)
    rated = [name for name in names if name in RATED and name in chosen]
    first = settings.seeds[0]
    jobs = [
        Job(_key(arm, rate, first), arm, first, rate, _teacher(arm, settings))
        for rates in (settings.rates, settings.controls)
        for arm in rated
        for rate in rates
    ]
    jobs += _longer(settings, chosen)
    for arm, seed in [(arm, seed) for arm in chosen for seed in settings.seeds]:
        if arm in RATED if seed == first else arm not in SEEDED:
            continue
        job = Job(f"{arm}-s{seed}", arm, seed, None)
        needs = (*_rated(job.family, settings), *_teacher(arm, settings))
        jobs.append(dataclasses.replace(job, needs=tuple(dict.fromkeys(needs))))
    return jobs


def _longer(settings: Settings, chosen: list[str]) -> list[Job]:
    """LONGER at both seeds, each at the best of all rates tried; the teacher trained as long."""
    jobs: list[Job] = []
    for seed in settings.seeds if settings.longer else ():
        for arm in [name for name in LONGER if name in chosen]:
            job = Job(_long(arm, seed, settings), arm, seed, None, steps=settings.longer)
            tried = (*settings.rates, *settings.controls)
            needs = [_key(job.family, rate, settings.seeds[0]) for rate in tried]
            if recipes()[arm].distillation:
                needs.append(_long("float", settings.seeds[0], settings))
            jobs.append(dataclasses.replace(job, needs=tuple(needs)))
    return jobs


def _long(arm: str, seed: int, settings: Settings) -> str:
    return f"{arm}-x{settings.longer}-s{seed}"


def _teacher(arm: str, settings: Settings) -> tuple[str, ...]:
    """The jobs of which the best is the teacher of an arm, if it has one."""
    recipe = recipes().get(arm)
    return _rated("float", settings) if recipe is None or recipe.distillation else ()


def _rated(arm: str, settings: Settings) -> tuple[str, ...]:
    return tuple(_key(arm, rate, settings.seeds[0]) for rate in settings.rates)


def _key(arm: str, rate: float, seed: int) -> str:
    return f"{arm}@{rate:g}-s{seed}"


def read_results(out: Path) -> dict[str, dict]:
    """Every result of a folder by key."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*-s*.json"))}


def best(results: dict[str, dict], arm: str, seed: int) -> dict | None:
    """The result of an arm's best learning rate at a seed, by the tuning part of the text."""
    found = [r for r in results.values() if r["arm"] == arm and r["seed"] == seed]
    return min(found, key=lambda result: result["bits_per_byte"][TUNE], default=None)


def of_length(results: dict[str, dict], steps: int | None) -> dict[str, dict]:
    """The results of runs of so many steps; None = all."""
    return {key: r for key, r in results.items() if steps in (None, r.get("steps"))}


def rate_of(job: Job, results: dict[str, dict], settings: Settings) -> float:
    """The rate of a job: its own, or the best of its family at the settings' steps.

    Changes of an arm keep to `settings.rates`, longer runs take controls as well.
    """
    if job.rate is not None:
        return job.rate
    known = of_length(results, settings.steps)
    if job.steps is None:
        known = {k: r for k, r in known.items() if r["rate"] not in settings.controls}
    found = best(known, job.family, settings.seeds[0])
    assert found is not None
    return found["rate"]


def teacher_of(results: dict[str, dict], settings: Settings, steps: int | None) -> dict | None:
    """The float result that teaches runs of so many steps (None: the settings')."""
    known = of_length(results, steps or settings.steps)
    if steps is None:
        known = {k: r for k, r in known.items() if r["rate"] not in settings.controls}
    return best(known, "float", settings.seeds[0])
