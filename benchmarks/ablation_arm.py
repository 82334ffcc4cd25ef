"""One arm: model, recipe, bytes -> trained, packed, scored; its result as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ablation_data import Corpus, Windows, bits_per_byte
from ablation_plan import PTQ, Job, Settings, rate_of, read_results, recipes, teacher_of

import ternc
from ternc.backend import ternc_backend
from ternc.config import Config
from ternc.demo.model import ByteDecoder
from ternc.train import TrainConfig, Trainer, insert_subln

ROWS = 40
"""Rows in the log of an arm: the only times at which the host waits for the device."""

CALIBRATION_WINDOWS = 128


class OutOfTime(Exception):
    """The call's time is over; the arm's checkpoint is written."""


def new_model(settings: Settings) -> torch.nn.Module:
    """The same architecture for every arm, an RMSNorm before each output projection included."""
    model = ByteDecoder(
        settings.width, settings.layers, settings.heads, settings.hidden, settings.context
    )
    insert_subln(model)
    return model.to(settings.device)


def compile_blocks(
    model: torch.nn.Module, backend: str | Callable, mode: str | None = None
) -> None:
    """Compiles each block in place: one graph serves them all, and later models of the kind."""
    torch._dynamo.config.recompile_limit = 64
    # A model whose features are watched must not take the graph of one whose are not.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend, mode=mode, dynamic=False)


def run_job(
    job: Job, corpus: Corpus, settings: Settings, out: Path, deadline: float = math.inf
) -> dict:
    """Trains and scores one job, or goes on with it; its result is also in out/<key>.json.

    Raises:
        OutOfTime: the deadline passed; a checkpoint is in out/<key>-run.
    """
    if job.arm in PTQ:
        result = _quantized_after_training(job, corpus, settings, out)
    else:
        result = _trained(job, corpus, settings, out, deadline)
    result = {"key": job.key, "arm": job.arm, "seed": job.seed, **result, **_machine(settings)}
    _write(out / f"{job.key}.json", result)
    return result


def config_of(job: Job, settings: Settings, out: Path) -> TrainConfig:
    """The recipe at its learning rate, in bf16 on a GPU."""
    rate = rate_of(job, read_results(out), settings)
    recipe = recipes()[job.arm]
    return recipe.replace(
        optimization=dataclasses.replace(recipe.optimization, learning_rate=rate),
        autocast="bfloat16" if settings.device == "cuda" else None,
    )


def load_teacher(settings: Settings, out: Path, steps: int | None = None) -> torch.nn.Module:
    """The best float arm, of the settings' steps or of so many."""
    known = teacher_of(read_results(out), settings, steps)
    assert known is not None
    model = new_model(settings)
    model.load_state_dict(torch.load(out / f"{known['key']}.pt", map_location=settings.device))
    return model.eval()


def score(model: torch.nn.Module, corpus: Corpus, settings: Settings) -> dict[str, float]:
    """Bits per byte of a packed or float model in fp32, by text."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        return {
            name: bits_per_byte(model, text, settings.context, settings.windows, settings.batch)
            for name, text in corpus.scored.items()
        }


def _trained(
    job: Job, corpus: Corpus, settings: Settings, out: Path, deadline: float
) -> dict[str, object]:
    config = config_of(job, settings, out)
    steps = job.steps or settings.steps
    torch.manual_seed(job.seed)
    model = ternc.train.prepare(new_model(settings), config, inplace=True)
    teacher = load_teacher(settings, out, job.steps) if config.distillation else None
    if settings.compiled:
        compile_blocks(model, ternc_backend if ternc.sites(model) else "inductor")
        if teacher is not None:
            compile_blocks(teacher, "inductor")
    watch = Watch(deadline, out / f"{job.key}-run" / "last")
    trainer = Trainer(
        model, config, teacher, folder=out / f"{job.key}-run", progress=False,
        log_every=max(1, steps // ROWS), callbacks=[watch],
    )  # fmt: skip
    per_part = steps // settings.parts
    loader = Windows(corpus.train, settings.batch, settings.context, per_part, job.seed)
    resume = watch.folder if (watch.folder / "training.json").is_file() else None
    start = time.monotonic()
    rows = trainer.train(loader, num_epochs=settings.parts, resume=resume)
    seconds = time.monotonic() - start
    packed = ternc.quantize(model) if trainer.sites else model
    scores = score(packed, corpus, settings)
    if not trainer.sites:
        torch.save(model.state_dict(), out / f"{job.key}.pt")
    shutil.rmtree(out / f"{job.key}-run", ignore_errors=True)
    last = {name: rows[-1].get(name) for name in ("loss", "zero_fraction", "flip_rate")}
    return {
        "rate": config.optimization.learning_rate,
        "bits_per_byte": scores,
        "steps": trainer.step,
        "bytes": trainer.step * settings.batch * settings.context,
        "seconds_of_last_call": seconds,
        "milliseconds_per_step": watch.milliseconds_per_step,
        "graphs_compiled_after_first_row": watch.late_graphs,
        "last_row": last,
        "bytes_at_rest": ternc.report(packed).totals.bytes_at_rest if trainer.sites else None,
        "losses": [[row["step"], row["loss"]] for row in rows],
        "config": config.to_dict(),
    }


class Watch:
    """Sees every row of a log: stops at the deadline, times the steps, counts late compilations."""

    def __init__(self, deadline: float, folder: Path) -> None:
        self.deadline, self.folder = deadline, folder
        self._marks: list[tuple[int, float, int]] = []

    def __call__(self, trainer: Trainer, row: dict) -> None:
        self._marks.append((row["step"], time.monotonic(), _graphs()))
        if time.monotonic() > self.deadline and trainer.step < trainer.total_steps:
            trainer.save(self.folder)
            raise OutOfTime

    @property
    def milliseconds_per_step(self) -> float | None:
        """Without the steps before the first row, which compile."""
        (step, start, _), (last, end, _) = self._marks[0], self._marks[-1]
        return 1e3 * (end - start) / (last - step) if last > step else None

    @property
    def late_graphs(self) -> int:
        """Graphs compiled after the first row: 0, whatever the schedule does."""
        return self._marks[-1][2] - self._marks[0][2]


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _quantized_after_training(
    job: Job, corpus: Corpus, settings: Settings, out: Path
) -> dict[str, object]:
    model = load_teacher(settings, out)
    windows = Windows(corpus.train, 8, settings.context, CALIBRATION_WINDOWS // 8, job.seed)
    batches = [batch[:, :-1] for batch in windows]
    start = time.monotonic()
    packed = ternc.quantize(
        model, Config(planes=PTQ[job.arm]), example_inputs=(batches[0],), calibration=batches
    )
    seconds = time.monotonic() - start
    return {
        "rate": rate_of(job, read_results(out), settings),
        "bits_per_byte": score(packed, corpus, settings),
        "seconds_of_last_call": seconds,
        "calibration_bytes": CALIBRATION_WINDOWS * settings.context,
        "bytes_at_rest": ternc.report(packed).totals.bytes_at_rest,
    }


def _machine(settings: Settings) -> dict[str, str]:
    name = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def _write(path: Path, value: dict) -> None:
    staged = path.with_suffix(".part")
    with contextlib.closing(staged.open("w")) as file:
        json.dump(value, file, indent=1)
    os.replace(staged, path)
