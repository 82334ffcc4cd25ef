"""`Trainer`: model, data -> a trained model that `ternc.quantize` packs.

One optimiser step, in this order: schedules -> forward and backward of every batch (task, KL,
logit gradients, features) -> weight-gradient alignment -> sum over processes -> sensitivities ->
DR-QAP -> ESTE-M -> clip -> optimiser -> log.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ternc.config import Config
from ternc.errors import InputError, TrainingError
from ternc.train import gradients
from ternc.train import resume as resume_files
from ternc.train.config import TrainConfig, as_train_config
from ternc.train.distill import Distiller
from ternc.train.generators import Generators
from ternc.train.log import TrainingLog, plot_curves
from ternc.train.metrics import TritMonitor
from ternc.train.momentum import make_momentum
from ternc.train.optimizer import make_optimizers, set_rates
from ternc.train.preparation import check_schedules, finish, prepare, set_schedule, states_at
from ternc.train.regularize import make_penalty
from ternc.train.schedule import Schedule
from ternc.train.sharding import full, rank, world_size
from ternc.train.site import final_quantizers, sites, unwrap
from ternc.train.task import (
    Example,
    Loss,
    call,
    cross_entropy,
    example_of,
    logits_of,
    predicts_next,
    scored,
    to_device,
)

BALANCE_EVERY = 50
"""Steps between two measurements of the gradient norms that balance the terms."""


class Trainer:
    """Trains `model`, which may be float (it is prepared in place), prepared, compiled or DDP.

    Args:
        config: default: the one the model was prepared with.
        teacher: any float module with the student's outputs; needed for `config.distillation`.
        loss: (output, batch) -> scalar; default: cross-entropy of logits and targets (task.py).
        folder: checkpoints, log.csv and curves.png go here.
        log_every: optimiser steps between two rows of the log.
        progress: lines on stderr; None shows them on a terminal.
        callbacks: called as callback(trainer, row) with every row of the log.

    Attributes:
        model: as it was given. `inner` is the user's module inside it.
        step: optimiser steps made.
        log: `log.rows` is the history.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig | Config | None = None,
        teacher: nn.Module | None = None,
        *,
        loss: Loss | None = None,
        folder: str | os.PathLike[str] | None = None,
        log_every: int = 10,
        progress: bool | None = None,
        callbacks: Iterable[Callable[[Trainer, dict[str, Any]], None]] = (),
    ) -> None:
        known = getattr(unwrap(model), "_ternc_train_config", None)
        self.config = known if config is None and known is not None else as_train_config(config)
        if known is None:
            prepared = prepare(unwrap(model), self.config, inplace=True)
            model = prepared if unwrap(model) is model else model
        self.model, self.inner = model, unwrap(model)
        self.sites = sites(model)
        check_schedules(self.inner, self.config)
        self.device = next(self.inner.parameters()).device
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.log = TrainingLog(self.folder if rank() == 0 else None, progress)
        self.log_every, self._callbacks = log_every, list(callbacks)
        self._next = predicts_next(self.inner)
        self._loss = loss or functools.partial(cross_entropy, next_token=self._next)
        self.teacher: nn.Module | None = None
        self.distiller: Distiller | None = None
        self.penalty = make_penalty(self.sites, self.config)
        self.momentum = make_momentum(self.config)
        self.monitor = TritMonitor()
        self.step = self.epoch = self.batch = 0
        self.best = math.inf
        self.generators = Generators()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.set_teacher_model(teacher)

    def set_teacher_model(self, teacher: nn.Module | None) -> None:
        """Sets the teacher, before training: projections belong to the optimiser."""
        if self.step:
            raise TrainingError("the teacher is set before the first step, not during a run")
        self.teacher = teacher
        self.distiller = None
        if teacher is not None and self.config.distillation is not None:
            teacher.requires_grad_(False)
            self.distiller = Distiller(self.model, teacher, self.config.distillation)
        self.optimizers = make_optimizers(self.model, self.config.optimization, self.distiller)

    def train(
        self,
        train_loader: Any,
        val_loader: Any = None,
        num_epochs: int = 1,
        save_every: int | None = None,
        eval_every: int | None = 1,
        resume: str | os.PathLike[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains for `num_epochs` passes over a loader; returns the log's rows.

        Args:
            train_loader: batches (task.py), as a list or anything else with a length.
            save_every, eval_every: epochs between two checkpoints, two evaluations of the final
                quantisers on `val_loader`; None = never.
            resume: a checkpoint folder: the run goes on as if it had not been interrupted.

        Raises:
            TrainingError: distillation without a teacher, no folder to save to, a loss that is not
                finite.
            InputError: the loader has no length, or no batch.
        """
        if self.config.distillation is not None and self.distiller is None:
            raise TrainingError("config.distillation needs a teacher: Trainer(..., teacher=model)")
        if save_every is not None and self.folder is None:
            raise TrainingError("save_every needs a folder: Trainer(..., folder='runs/one')")
        if not hasattr(train_loader, "__len__"):
            raise InputError(
                f"train_loader is a {type(train_loader).__name__} without a length: rates and "
                "schedules depend on the number of steps; give a list of batches or a DataLoader"
            )
        self._steps_per_epoch = math.ceil(len(train_loader) / self.config.accumulate)
        self.total_steps = num_epochs * self._steps_per_epoch
        if resume is not None:
            self.load(resume)
        set_schedule(self.inner, None)
        self._states: tuple[Any, Any] = (None, None)
        self.model.train()
        while self.epoch < num_epochs:
            self._run_epoch(train_loader)
            self.epoch, self.batch = self.epoch + 1, 0
            if val_loader is not None and eval_every and self.epoch % eval_every == 0:
                self._validate(val_loader)
            if save_every is not None and self.epoch % save_every == 0:
                self.save(self.folder / f"epoch-{self.epoch}")  # type: ignore[operator]
        finish(self.inner)
        if self.folder is not None and rank() == 0:
            with contextlib.suppress(ImportError):
                plot_curves(self.log.rows, self.folder / "curves.png")
        return self.log.rows

    @torch.no_grad()
    def evaluate(self, loader: Any, final: bool = True) -> dict[str, float]:
        """Mean task loss per valid token, and its perplexity.

        Args:
            final: with the final quantisers, as the model would be packed; else as it is trained.
        """
        training = self.inner.training
        self.inner.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        with final_quantizers(self.inner) if final else contextlib.nullcontext():
            for batch in loader:
                batch = to_device(batch, self.device)
                example = example_of(batch, self._next)
                with self._autocast():
                    output = call(self.inner, example)
                    value = self._loss(output, batch)
                count = 1
                if example.targets is not None:
                    count = int(scored(logits_of(output), example)[2].sum())
                total += torch.tensor([value.item() * count, count], device=self.device)
        if self.distiller is not None:
            self.distiller.release()
        self.inner.train(training)
        if dist.is_initialized():
            dist.all_reduce(total)
        mean = (total[0] / total[1].clamp(min=1)).item()
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a checkpoint (resume.py); every process calls it."""
        resume_files.save_run(self, Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Takes up the run that `save` wrote.

        Raises:
            CheckpointError: a file is missing, damaged, or of another model or configuration.
        """
        self.generators.resume(resume_files.load_run(self, Path(folder)))

    def parts(self) -> Iterator[tuple[str, Any]]:
        """What has state beside model and optimisers, by the prefix of its tensors."""
        yield "monitor", self.monitor
        for prefix in ("distiller", "penalty", "momentum"):
            if (part := getattr(self, prefix)) is not None:
                yield prefix, part

    def _run_epoch(self, loader: Any) -> None:
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        batches = self.generators.batches(loader, self.batch)
        size = self.config.accumulate
        while chunk := [batch for _, batch in zip(range(size), batches, strict=False)]:
            self.batch += len(chunk)
            self._optimize([to_device(batch, self.device) for batch in chunk])
        if not self.batch:
            raise InputError(f"epoch {self.epoch + 1}: the loader gave no batch")

    def _optimize(self, batches: list[Any]) -> None:
        """One optimiser step."""
        self._set_schedules()
        set_rates(self.optimizers, self.config.optimization, self.step, self.total_steps)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.distiller is not None and self.config.distillation.balance:  # type: ignore[union-attr]
            self._balance(batches[0])
        values: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                self._backward(batch, 1 / len(batches), values)
        self._align_gradients(batches, values)
        if self.penalty is not None:
            self.penalty.observe(self.sites)
            strength = self.penalty.strength(
                self.step / self.total_steps, self.step / self._steps_per_epoch
            )
            values["penalty"] = self.penalty.add_gradient(self.sites, strength)
        if self.momentum is not None:
            self.momentum.apply(self.sites)
        if self.config.optimization.clip is not None:
            every = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
            nn.utils.clip_grad_norm_(every, self.config.optimization.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.step % self.log_every == 0 or self.step == self.total_steps:
            self._record(values)

    def _backward(self, batch: Any, share: float, values: dict[str, torch.Tensor]) -> None:
        example = example_of(batch, self._next)
        with self._autocast():
            output = call(self.model, example)
            terms = {"loss": self._loss(output, batch)}
            total = terms["loss"]
            if self.distiller is not None:
                total = total * self.config.distillation.task  # type: ignore[union-attr]
                extra = self.distiller.terms(output, example)
                terms.update(extra)
                total = total + sum(extra.values())
        (total * share).backward()
        if self.distiller is not None:
            self.distiller.release()
        for name, term in terms.items():
            values[name] = values.get(name, 0) + share * term.detach()

    def _align_gradients(self, batches: list[Any], values: dict[str, torch.Tensor]) -> None:
        """The weight-gradient modes of distillation; every process aligns its own batches."""
        config = self.config.distillation
        if self.teacher is None or config is None or not config.beta or config.gradient == "logit":
            return
        add = (
            gradients.add_alignment_gradient
            if config.gradient == "hvp"
            else gradients.add_exact_alignment_gradient
        )
        for batch in batches:
            loss = self._task_loss(batch)
            target = gradients.teacher_gradients(self.inner, self.teacher, loss)
            weight = config.beta / (len(batches) * world_size())
            value = add(self.inner, loss, target, weight)
            values["gradient"] = values.get("gradient", 0) + config.beta * value / len(batches)
        # A compiled student is guarded on finding no features of an earlier forward.
        self.distiller.release()  # type: ignore[union-attr]

    def _task_loss(self, batch: Any) -> gradients.ScalarLoss:
        def loss(model: nn.Module) -> torch.Tensor:
            with self._autocast():
                return self._loss(call(model, example_of(batch, self._next)), batch)

        return loss

    def _balance(self, batch: Any) -> None:
        if self.step % BALANCE_EVERY:
            return
        example: Example = example_of(batch, self._next)
        with self._autocast():
            self.distiller.measure_balance(  # type: ignore[union-attr]
                self.inner, example, lambda output: self._loss(output, batch)
            )

    def _set_schedules(self) -> None:
        weights, activations = self.config.schedule, self.config.activation_schedule
        if weights is not None or activations is not None:
            progress = [self._progress(schedule) for schedule in (weights, activations)]
            states = states_at(self.config, *progress)
            if states != self._states:  # most steps of a stage stay where they are
                set_schedule(self.inner, *states)
                self._states = states

    def _progress(self, schedule: Schedule | None) -> float:
        """Where the run is, in the unit of a schedule: a function of the step alone."""
        if schedule is None or schedule.unit == "step":
            return float(self.step)
        whole = self._steps_per_epoch if schedule.unit == "epoch" else self.total_steps
        return self.step / whole

    def _record(self, values: dict[str, torch.Tensor]) -> None:
        row: dict[str, Any] = {"step": self.step, "epoch": self.step / self._steps_per_epoch}
        row.update({name: float(value) for name, value in values.items()})
        broken = next(
            (site.name for site in self.sites if not full(site.weight).isfinite().all()), None
        )
        if broken is not None or not math.isfinite(row["loss"]):
            raise TrainingError(
                f"step {self.step}: the loss is {row['loss']}"
                + (f" and the weight of {broken} is not finite" if broken else "")
                + f"; lower the learning rate ({self.config.optimization.learning_rate:g}) or look "
                "at the data"
            )
        row["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        row.update(self.monitor.look(self.sites))
        self._add_row(row)

    def _validate(self, loader: Any) -> None:
        found = self.evaluate(loader)
        row = {"step": self.step, "epoch": float(self.epoch)}
        row.update({f"validation_{name}": value for name, value in found.items()})
        self._add_row(row)
        if found["loss"] < self.best:
            self.best = found["loss"]
            if self.folder is not None:
                self.save(self.folder / "best")

    def _add_row(self, row: dict[str, Any]) -> None:
        self.log.add(row, self.total_steps)
        for callback in self._callbacks:
            callback(self, row)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        return getattr(self.model, "no_sync", contextlib.nullcontext)()
