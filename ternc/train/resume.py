"""Trainer <-> checkpoint folder: everything that the next step depends on.

Model, optimisers, counters, schedule position, averages, codes, and the random state of now and of
the epoch's start, from which the order of its batches is drawn again. Where weights are sharded,
every process writes its share; such a folder too is taken up by any number of processes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ternc.errors import CheckpointError
from ternc.train import checkpoint
from ternc.train.sharded_checkpoint import Empty, read_sharded, write_sharded
from ternc.train.sharding import rank

if TYPE_CHECKING:
    from ternc.train.trainer import Trainer

MODEL_PREFIX = "model."
"""Of the student's tensors in a sharded checkpoint, where everything is in one list of names."""


def save_run(trainer: Trainer, folder: Path) -> None:
    """Writes a folder; every process writes its random state, the first one what is not sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    first, sharded = rank() == 0, _is_sharded(trainer)
    if first:
        (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
    checkpoint.save_tensors(folder / _random_file(), trainer.generators.states())
    tensors, aliases = checkpoint.model_state(trainer.inner)
    state, settings = checkpoint.optimizer_state(trainer.optimizers)
    for prefix, part in trainer.parts():
        state.update({f"{prefix}.{name}": value for name, value in part.state_dict().items()})
    if sharded:
        named = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        write_sharded(folder, {**named, **state})
    if not first:
        return
    if not sharded:
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
            "sharded": sharded,
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
    if manifest.get("sharded"):
        every = read_sharded(folder, _empty_tensors(trainer))
        named = {n.removeprefix(MODEL_PREFIX): t for n, t in every.items() if _of_model(n)}
        tensors = {name: tensor for name, tensor in every.items() if not _of_model(name)}
    else:
        named = checkpoint.read_tensors(folder / checkpoint.MODEL)
        tensors = checkpoint.read_tensors(folder / checkpoint.TRAINING)
    checkpoint.load_model_state(trainer.inner, named, manifest["aliases"])
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


def _is_sharded(trainer: Trainer) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in trainer.inner.parameters())


def _of_model(name: str) -> bool:
    return name.startswith(MODEL_PREFIX)


def _empty_tensors(trainer: Trainer) -> Empty:
    """What the tensors of a sharded checkpoint are read into: shards where this run has shards."""
    held = {f"{MODEL_PREFIX}{n}": t for n, t in trainer.inner.state_dict().items()}
    for i, optimizer in enumerate(trainer.optimizers):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        held.update({f"optimizer.{i}.{n}": p.detach() for n, p in enumerate(parameters)})

    def empty(name: str, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        owner = held.get(name, held.get(name.rpartition(".")[0]))
        if owner is not None and owner.shape == size:
            return torch.empty_like(owner, dtype=dtype)
        return torch.empty(size, dtype=dtype, device=trainer.device)

    return empty


def _random_file() -> str:
    return f"random.{rank()}.safetensors"
