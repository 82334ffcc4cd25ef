"""Trainer <-> checkpoint folder: everything that the next step depends on.

Model, optimisers, counters, schedule position, averages, codes, and the random state of now and of
the epoch's start, from which the order of its batches is drawn again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ternc.errors import CheckpointError
from ternc.train import checkpoint

if TYPE_CHECKING:
    from ternc.train.trainer import Trainer


def save_run(trainer: Trainer, folder: Path) -> None:
    """Writes a folder; every process writes its random state, the first one everything else."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / _random_file(), trainer.random_states())
    tensors, aliases = checkpoint.model_state(trainer.inner)
    state, settings = checkpoint.optimizer_state(trainer.optimizers)
    for prefix, part in trainer.parts():
        state.update({f"{prefix}.{name}": value for name, value in part.state_dict().items()})
    if dist.is_initialized() and dist.get_rank() != 0:
        return  # what is sharded was gathered by all
    checkpoint.save_tensors(folder / checkpoint.MODEL, tensors)
    checkpoint.save_tensors(folder / checkpoint.TRAINING, state)
    checkpoint.write_manifest(
        folder,
        {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "batch": trainer.batch,
            "best": trainer.best if math.isfinite(trainer.best) else None,
            "config": trainer.config.to_dict(),
            "optimizers": settings,
            "aliases": aliases,
            "log": trainer.log.rows,
        },
    )


def load_run(trainer: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    """Puts a saved run into `trainer`; returns the random states of this process.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model or configuration.
    """
    manifest = checkpoint.read_manifest(folder)
    saved, own = manifest["config"], checkpoint.plain(trainer.config.to_dict())
    if saved != own:
        names = [name for name in own if saved.get(name) != own[name]]
        raise CheckpointError(
            f"{folder}: the run was started with other values of {', '.join(names)}; resume it "
            "with its own configuration"
        )
    checkpoint.load_model_state(trainer.inner, folder, manifest["aliases"])
    tensors = checkpoint.read_tensors(folder / checkpoint.TRAINING)
    checkpoint.load_optimizer_state(trainer.optimizers, tensors, manifest["optimizers"])
    for prefix, part in trainer.parts():
        part.load_state_dict(
            {
                name.removeprefix(f"{prefix}."): value.to(trainer.device)
                for name, value in tensors.items()
                if name.startswith(f"{prefix}.")
            }
        )
    trainer.step, trainer.epoch = manifest["step"], manifest["epoch"]
    trainer.batch = manifest["batch"]
    trainer.best = math.inf if manifest["best"] is None else manifest["best"]
    trainer.log.restore(manifest["log"])
    own = folder / _random_file()
    # A run on more processes than before: the new ones have no random state of their own yet.
    return checkpoint.read_tensors(own) if own.is_file() else {}


def _random_file() -> str:
    return f"random.{dist.get_rank() if dist.is_initialized() else 0}.safetensors"
