"""`BitNetV3Trainer`: the page's trainer over `ternc.train.Trainer`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ternc.bitnet_v3.models import BitNetV3Model
from ternc.bitnet_v3.modules import PAGE_STAGES, all_features
from ternc.bitnet_v3.utils import BitNetV3Config
from ternc.errors import TrainingError
from ternc.train.config import TrainConfig
from ternc.train.preparation import prepare, set_schedule
from ternc.train.schedule import BlendState, Schedule, Stage
from ternc.train.site import unwrap
from ternc.train.trainer import Trainer


class MPQScheduler:
    """Epochs -> bits: the page's stages and temperature, over `ternc.train.Schedule`."""

    def __init__(
        self,
        stages: Any = PAGE_STAGES,
        temperature_schedule: str = "linear",
        stage_epochs: Sequence[float] | None = None,
        mode: str = "normalised",
    ) -> None:
        self.schedule = Schedule(
            stages=stages,
            stage_epochs=stage_epochs,
            temperature=temperature_schedule,  # type: ignore[arg-type]
            mode=mode,  # type: ignore[arg-type]
        )

    def at(self, epoch: float) -> BlendState:
        """Source bits, target bits and blend at an epoch, counted from 0."""
        return self.schedule.at(epoch)

    def get_bits(self, epoch: float) -> float:
        """The bits that an epoch works towards."""
        return self.at(epoch).target

    def set_epoch(self, model: nn.Module, epoch: float) -> BlendState:
        """Moves every layer of `model` that follows a schedule to an epoch."""
        state = self.at(epoch)
        set_schedule(model, state)
        return state


def create_mpq_schedule(
    stages: Any = PAGE_STAGES, stage_epochs: Sequence[float] | None = None, **options: Any
) -> MPQScheduler:
    """An `MPQScheduler`."""
    return MPQScheduler(stages, stage_epochs=stage_epochs, **options)


class BitNetV3Trainer:
    """Trains a model with the techniques that its configuration names.

    Args:
        config: `BitNetV3Config` or `TrainConfig`; default: the one of the model, or all techniques.
        batch_size: sequences in one optimiser step; batches of a loader are accumulated up to it.
        output_dir: checkpoints, log and curves.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BitNetV3Config | TrainConfig | None = None,
        *,
        batch_size: int | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        inner = unwrap(model)
        if config is None:
            config = getattr(inner, "config", None)
        if not isinstance(config, (BitNetV3Config, TrainConfig)):
            config = getattr(inner, "_ternc_train_config", None) or all_features()
        self.config = config
        self.train_config = config.train_config() if isinstance(config, BitNetV3Config) else config
        if not hasattr(inner, "_ternc_train_config"):
            model = prepare(inner, self.train_config, inplace=True) if model is inner else model
        self.model = model
        self.batch_size = batch_size
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.teacher_model: nn.Module | None = None
        self.trainer: Trainer | None = None
        self._progress = progress

    def set_teacher_model(self, teacher: nn.Module | str | os.PathLike[str] | Mapping) -> None:
        """The float model to learn from: a module, a folder of `save_pretrained`, a state dict.

        Raises:
            TrainingError: a file: a whole pickled model would run whatever code it holds.
        """
        if isinstance(teacher, nn.Module):
            self.teacher_model = teacher
        elif isinstance(teacher, Mapping):
            config = getattr(unwrap(self.model), "config", None)
            if not isinstance(config, BitNetV3Config):
                raise TrainingError("a teacher's state dict needs a BitNetV3Model as student")
            self.teacher_model = BitNetV3Model(config, prepared=False)
            self.teacher_model.load_state_dict(dict(teacher))
        elif Path(teacher).is_dir():
            self.teacher_model = BitNetV3Model.from_pretrained(teacher)
        else:
            raise TrainingError(
                f"{teacher} is no folder of save_pretrained: a pickled model is not loaded; pass "
                "the module, such a folder, or torch.load(path, weights_only=True)"
            )

    def train(
        self,
        train_dataloader: Any,
        val_dataloader: Any = None,
        num_epochs: int = 70,
        save_every: int | None = None,
        eval_every: int | None = 1,
        resume: str | os.PathLike[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains and returns the rows of the log.

        Stages are stretched to `num_epochs`, so that every run ends with ternary weights. A data
        set in the place of a loader is batched and shuffled.
        """
        loader = self._loader(train_dataloader)
        config = stretched(self.train_config, num_epochs)
        if config.distillation is not None and self.teacher_model is None:
            warnings.warn(
                "no teacher was set: trained without distillation (set_teacher_model)",
                stacklevel=2,
            )
            config = config.replace(distillation=None)
        size = getattr(loader, "batch_size", None)
        if self.batch_size and size:
            config = config.replace(accumulate=max(1, self.batch_size // size))
        if save_every is not None and self.output_dir is None:
            self.output_dir = Path("bitnet_v3_checkpoints")
        self.trainer = Trainer(
            self.model,
            config,
            self.teacher_model,
            folder=self.output_dir,
            progress=self._progress,
        )
        return self.trainer.train(
            loader, val_dataloader, num_epochs, save_every, eval_every, resume
        )

    def _loader(self, data: Any) -> Any:
        if isinstance(data, torch.utils.data.Dataset):
            return DataLoader(data, self.batch_size or 1, shuffle=True)
        return data


def create_trainer(
    model: nn.Module,
    learning_rate: float = 3e-4,
    batch_size: int = 256,
    enable_mpq: bool = True,
    enable_gakd: bool = True,
    **options: Any,
) -> BitNetV3Trainer:
    """A trainer for any model; what is not enabled is left out, whatever the model has."""
    known = BitNetV3Trainer(model, **options)
    config = known.train_config
    changes: dict[str, Any] = {
        "optimization": dataclasses.replace(config.optimization, learning_rate=learning_rate)
    }
    if not enable_mpq:
        changes["schedule"] = None
    if not enable_gakd:
        changes["distillation"] = None
    elif config.distillation is None:
        changes["distillation"] = all_features().distillation
    known.train_config = config.replace(**changes)
    known.batch_size = batch_size
    return known


def stretched(config: TrainConfig, epochs: float) -> TrainConfig:
    """The configuration with stages in epochs as long, together, as the run."""
    changes = {}
    for name in ("schedule", "activation_schedule"):
        schedule = getattr(config, name)
        if schedule is not None and schedule.unit == "epoch" and schedule.length != epochs:
            factor = epochs / schedule.length
            stages = [Stage(s.bits, s.length * factor, s.ramp) for s in schedule.stages]
            changes[name] = dataclasses.replace(schedule, stages=stages)
    return config.replace(**changes)
