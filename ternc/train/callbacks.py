"""The pieces of `Trainer` for transformers' Trainer.

    callback = hf_callback(model, config, teacher)
    transformers.Trainer(model, ..., callbacks=[callback])

The model is prepared first (`ternc.train.prepare`). Schedules, DR-QAP and ESTE-M run at the hooks
of each optimiser step; `callback.hooks.distillation_loss` is added in one's own compute_loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ternc.errors import ConfigError, MissingExtraError
from ternc.train.config import TrainConfig
from ternc.train.distill import kl_divergence, logit_gradient_distance
from ternc.train.metrics import TritMonitor
from ternc.train.momentum import make_momentum
from ternc.train.preparation import finish, set_schedule, states_at
from ternc.train.regularize import make_penalty
from ternc.train.schedule import Schedule
from ternc.train.site import sites
from ternc.train.task import Example, logits_of, scored


class TrainingHooks:
    """What happens around an optimiser step, for any training loop.

    Raises:
        ConfigError: distillation by weight gradients or features, which only `Trainer` runs.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None = None
    ) -> None:
        self.model, self.config, self.teacher = model, config, teacher
        self.sites = sites(model)
        self.penalty = make_penalty(self.sites, config)
        self.momentum = make_momentum(config)
        self.monitor = TritMonitor()
        distillation = config.distillation
        if distillation is not None and (distillation.gamma or distillation.gradient != "logit"):
            raise ConfigError(
                "hooks distil logits: gamma=0 and gradient='logit'; ternc.train.Trainer does more"
            )

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
        logits, config = logits_of(output), self.config.distillation
        if self.teacher is None or config is None:
            return logits.new_zeros(())
        example = Example((), inputs, labels, shifted=labels is not None and labels.dim() > 1)
        with torch.no_grad():
            known = logits_of(self.teacher(**inputs))
        student, _, valid = scored(logits, example, config.ignore_index)
        teacher, _, _ = scored(known, example, config.ignore_index)
        loss = config.alpha * kl_divergence(student, teacher, valid, config.temperature)
        return loss + config.beta * logit_gradient_distance(student, teacher, valid)

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

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            per_epoch = round(state.max_steps / max(state.num_train_epochs or 1, 1))
            hooks.begin_step(state.global_step, state.max_steps, per_epoch)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            hooks.before_optimizer()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any
        ) -> None:
            if logs is not None:
                logs.update(hooks.monitor.look(hooks.sites))

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            hooks.end()

    callback = Callback()
    callback.hooks = hooks
    return callback
