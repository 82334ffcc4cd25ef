"""The pieces of `Trainer` for transformers' Trainer.

    callback = hf_callback(model, config, teacher)
    transformers.Trainer(model, ..., callbacks=[callback])

The model is prepared first (`ternc.train.prepare`). Schedules, DR-QAP and ESTE-M run at the hooks
of each optimiser step, their averages lie in its checkpoints; `callback.hooks.distillation_loss` is
added in one's own compute_loss. Optimiser, rates, accumulation and autocast are that Trainer's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import ConfigError, MissingExtraError
from ternc.train.checkpoint import read_tensors, save_tensors
from ternc.train.config import TrainConfig
from ternc.train.distill import Distiller
from ternc.train.metrics import TritMonitor
from ternc.train.momentum import make_momentum
from ternc.train.preparation import finish, set_schedule, states_at
from ternc.train.regularize import make_penalty
from ternc.train.schedule import Schedule
from ternc.train.site import sites, unwrap
from ternc.train.task import Example, logits_of, predicts_next


class TrainingHooks:
    """What happens around an optimiser step, for any training loop.

    Raises:
        ConfigError: distillation by weight gradients or features, which only `Trainer` runs.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None
    ) -> None:
        self.model, self.config = model, config
        self.sites = sites(model)
        self._next = predicts_next(unwrap(model))
        self.penalty = make_penalty(self.sites, config)
        self.momentum = make_momentum(config)
        self.monitor = TritMonitor()
        distillation = config.distillation
        if distillation is not None and (
            distillation.gamma or distillation.balance or distillation.gradient != "logit"
        ):
            raise ConfigError(
                "hooks distil logits: gamma=0, balance=False and gradient='logit'; "
                "ternc.train.Trainer does more"
            )
        self.distiller: Distiller | None = None
        if teacher is not None and distillation is not None:
            self.distiller = Distiller(model, teacher, distillation)

    def begin_step(self, step: int, total: int, per_epoch: int) -> None:
        """Before the first forward of optimiser step `step`, counted from 0."""
        self._step, self._total, self._per_epoch = step, max(total, 1), max(per_epoch, 1)
        schedules = (self.config.schedule, self.config.activation_schedule)
        if schedules != (None, None):
            set_schedule(self.model, *states_at(self.config, *map(self._progress, schedules)))

    def before_optimizer(self) -> None:
        """When gradients are final, before they are clipped where the loop allows it."""
        if self.penalty is not None:
            self.penalty.observe(self.sites)
            strength = self.penalty.strength(self._step / self._total, self._step / self._per_epoch)
            self.penalty.add_gradient(self.sites, strength)
        if self.momentum is not None:
            self.momentum.apply(self.sites)

    def distillation_loss(self, output: Any, inputs: dict[str, Any], labels: Any) -> torch.Tensor:
        """The teacher's weighted terms; 0 without a teacher."""
        if self.distiller is None:
            return logits_of(output).new_zeros(())
        shifted = self._next and labels is not None and labels.dim() > 1
        terms = self.distiller.terms(output, Example((), inputs, labels, shifted))
        return sum(terms.values(), logits_of(output).new_zeros(()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages that steps leave behind, for a checkpoint."""
        return {
            f"{prefix}.{name}": value
            for prefix, part in self._parts()
            for name, value in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        for prefix, part in self._parts():
            start = f"{prefix}."
            part.load_state_dict(
                {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)}
            )

    def _parts(self) -> Iterator[tuple[str, Any]]:
        yield "monitor", self.monitor
        for prefix in ("penalty", "momentum"):
            if (part := getattr(self, prefix)) is not None:
                yield prefix, part

    def end(self) -> None:
        """After the last step: the final quantisers, ready to be packed."""
        finish(self.model)

    def _progress(self, schedule: Schedule | None) -> float:
        if schedule is None or schedule.unit == "step":
            return float(self._step)
        return self._step / (self._per_epoch if schedule.unit == "epoch" else self._total)


def hf_callback(model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None) -> Any:
    """A `transformers.TrainerCallback` that runs `TrainingHooks`; `.hooks` are those.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "its Trainer's callback") from error
    hooks = TrainingHooks(model, config, teacher)

    class Callback(TrainerCallback):
        hooks: TrainingHooks

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step:
                _take_up(hooks, _file(args, state))

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero and _file(args, state).parent.is_dir():
                save_tensors(_file(args, state), hooks.state_dict())

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            per_epoch = round(state.max_steps / max(state.num_train_epochs or 1, 1))
            hooks.begin_step(state.global_step, state.max_steps, per_epoch)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            hooks.before_optimizer()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any
        ) -> None:
            found = hooks.monitor.look(hooks.sites)
            for row in (logs, *state.log_history[-1:]):
                if row is not None:
                    row.update(found)

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            hooks.end()

    callback = Callback()
    callback.hooks = hooks
    return callback


def _file(args: Any, state: Any) -> Path:
    """Where the averages of a step lie, in the checkpoint that transformers writes at it."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "ternc.safetensors"


def _take_up(hooks: TrainingHooks, path: Path) -> None:
    if path.is_file():
        device = hooks.sites[0].weight.device if hooks.sites else None
        hooks.load_state_dict({n: v.to(device) for n, v in read_tensors(path).items()})
    elif hooks.penalty is not None or hooks.momentum is not None:
        warnings.warn(f"{path} is missing: averages of gradients start anew", stacklevel=2)
