"""Time of a training step: float in bf16 under torch.compile, recipes under ternc, the teacher.

On a GPU also what the step's kernels take, by the profiler, and what the host takes to launch them:
a busy host keeps the GPU waiting, and then the ratio of steps is the host's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ablation_arm import compile_blocks, new_model
from ablation_data import Corpus, Windows
from ablation_plan import Settings, recipes
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import ternc
from ternc.backend import ternc_backend
from ternc.train import TrainConfig, Trainer

ROUNDS = 5
STEPS = 8
"""Steps of a sample."""

WARM_UP = 4
PROFILED = 2
"""Steps under the profiler."""

LISTED = 40
"""Kernels of an arm that are named."""

WITH_TEACHER = ", with its teacher"
"""The same recipe with the teacher's forward pass and the terms it adds to the loss."""


@dataclasses.dataclass
class Runner:
    """A trainer whose steps are timed one sample at a time."""

    trainer: Trainer
    batches: list[torch.Tensor]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def sample(self, steps: int) -> float:
        """Seconds of a step, the device waited for before and after."""
        _wait(self.trainer.device)
        start = time.perf_counter()
        for index in range(steps):
            self.trainer._optimize([self.batches[index % len(self.batches)]])
        _wait(self.trainer.device)
        return (time.perf_counter() - start) / steps

    def host_seconds(self) -> float:
        """Seconds until the host has launched all of one step."""
        _wait(self.trainer.device)
        start = time.perf_counter()
        self.trainer._optimize([self.batches[0]])
        return time.perf_counter() - start

    def kernels(self) -> dict[str, tuple[float, float]]:
        """Microseconds and number of every kernel in a step, by name, most time first."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            self.sample(PROFILED)
        sums: dict[str, tuple[float, float]] = {}
        for event in profiled.events():
            # Ranges that the optimiser marks are not kernels.
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer."):
                time_, count = sums.get(event.name, (0.0, 0.0))
                spent = event.device_time_total / PROFILED
                sums[event.name] = time_ + spent, count + 1 / PROFILED
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def measure(corpus: Corpus, settings: Settings, whole: bool, arms: tuple[str, ...]) -> dict:
    """Milliseconds of a step by arm, ratios to float in the same rounds, the teacher's forward."""
    batches = list(Windows(corpus.train, settings.batch, settings.context, 2, seed=0))
    teacher = new_model(settings).eval()
    _compile(teacher, "inductor", settings, whole)
    runners: dict[str, Runner] = {}
    for arm in ("float", *arms):
        recipe = recipes()[arm]
        alone = recipe.replace(distillation=None)
        runners[arm] = Runner(_trainer(alone, settings, whole), batches)
        if recipe.distillation is not None:
            taught = _trainer(recipe, settings, whole, teacher)
            runners[arm + WITH_TEACHER] = Runner(taught, batches)
    compile_seconds = {name: runner.sample(WARM_UP) * WARM_UP for name, runner in runners.items()}
    forward = []
    for _ in range(ROUNDS):
        for runner in runners.values():
            runner.seconds.append(runner.sample(STEPS))
        forward.append(_forward(teacher, batches[0], settings))
    middle = {name: statistics.median(runner.seconds) for name, runner in runners.items()}
    return {
        **(_on_the_device(runners) if settings.device == "cuda" else {}),
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "ratio_to_float": {
            name: statistics.median(
                own / base
                for own, base in zip(runner.seconds, runners["float"].seconds, strict=True)
            )
            for name, runner in runners.items()
        },
        "teacher_forward_milliseconds": 1e3 * statistics.median(forward[1:]),
        "first_steps_seconds": compile_seconds,
        "bytes_per_step": settings.batch * settings.context,
        "compiled": "the whole model" if whole else "block by block",
        "mode": settings.mode,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu",
    }


def _on_the_device(runners: dict[str, Runner]) -> dict:
    """Milliseconds of kernels and of the host by arm, and the kernels themselves."""
    kernels = {name: runner.kernels() for name, runner in runners.items()}
    spent = {name: sum(us for us, _ in found.values()) / 1e3 for name, found in kernels.items()}
    host = {
        name: 1e3 * statistics.median(runner.host_seconds() for _ in range(ROUNDS))
        for name, runner in runners.items()
    }
    return {
        "kernel_milliseconds": spent,
        "kernel_ratio_to_float": {name: value / spent["float"] for name, value in spent.items()},
        "kernel_count": {
            name: sum(count for _, count in found.values()) for name, found in kernels.items()
        },
        "host_milliseconds": host,
        "kernels": {name: dict(list(found.items())[:LISTED]) for name, found in kernels.items()},
    }


def _trainer(
    config: TrainConfig, settings: Settings, whole: bool, teacher: torch.nn.Module | None = None
) -> Trainer:
    config = config.replace(autocast="bfloat16" if settings.device == "cuda" else None)
    model = ternc.train.prepare(new_model(settings), config, inplace=True)
    _compile(model, ternc_backend if ternc.sites(model) else "inductor", settings, whole)
    trainer = Trainer(model, config, teacher, progress=False, log_every=1 << 30)
    trainer.total_steps = trainer._steps_per_epoch = 1 << 20
    trainer._states = (None, None)
    model.train()
    return trainer


def _compile(
    model: torch.nn.Module, backend: str | Callable, settings: Settings, whole: bool
) -> None:
    if settings.compiled and whole:
        model.compile(backend=backend, mode=settings.mode, dynamic=False)
    elif settings.compiled:
        compile_blocks(model, backend, settings.mode)


@torch.no_grad()
def _forward(teacher: torch.nn.Module, batch: torch.Tensor, settings: Settings) -> float:
    _wait(batch.device)
    start = time.perf_counter()
    for _ in range(STEPS):
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.device == "cuda"):
            F.log_softmax(teacher(batch[:, :-1]).float(), -1)
    _wait(batch.device)
    return (time.perf_counter() - start) / STEPS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
