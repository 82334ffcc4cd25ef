"""A training run <-> a folder, without pickle, so that it goes on bit for bit.

model.safetensors        the student's state_dict: master weights and schedule state
training.safetensors     optimisers, averages, codes, projections
sharded/*.safetensors    both, of a model whose weights are sharded (sharded_checkpoint.py)
random.<rank>.safetensors  random state of each process
training.json            counters, optimiser settings, tied names, configuration
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import CheckpointError
from ternc.modules.ties import memory_key
from ternc.train.sharding import like

MODEL, TRAINING, MANIFEST = "model.safetensors", "training.safetensors", "training.json"
VERSION = 1


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a file under a temporary name first; it never replaces a good one by half of one."""
    from safetensors.torch import save_file

    staged = path.with_name(f".{path.name}.part")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, staged)
    os.replace(staged, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the JSON file, last of all: a folder without it is no checkpoint."""
    staged = folder / f".{MANIFEST}.part"
    staged.write_text(json.dumps({"version": VERSION, **values}, indent=1), encoding="utf-8")
    os.replace(staged, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The JSON file.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if values.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {values.get('version')!r}, not {VERSION}")
    return values


def model_state(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state_dict with tied tensors once, sharded ones as they are, and for every other name the
    stored one.
    """
    owners: dict[Any, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = memory_key(tensor)
        if key in owners:
            aliases[name] = owners[key]
        else:
            owners[key], tensors[name] = name, tensor
    return tensors, aliases


def load_model_state(
    model: nn.Module, stored: Mapping[str, torch.Tensor], aliases: Mapping[str, str]
) -> None:
    """Loads the student in place.

    Raises:
        CheckpointError: names or shapes are not the model's.
    """
    tensors = dict(stored)
    tensors.update({alias: tensors[name] for alias, name in aliases.items() if name in tensors})
    own = model.state_dict()
    tensors = {n: like(t, own[n]) if n in own else t for n, t in tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}") from error


def optimizer_state(
    optimizers: list[torch.optim.Optimizer],
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors by `optimizer.<i>.<parameter>.<key>`, sharded ones as they are, the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    settings: list[dict[str, Any]] = []
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        plain: dict[str, Any] = {}
        for parameter, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{i}.{parameter}.{key}"] = value
                else:
                    plain.setdefault(str(parameter), {})[key] = value
        settings.append({"groups": state["param_groups"], "state": plain})
    return tensors, settings


def load_optimizer_state(
    optimizers: list[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
    settings: list[dict[str, Any]],
) -> None:
    """Inverse of `optimizer_state`.

    Raises:
        CheckpointError: another number of optimisers or Parameters.
    """
    if len(settings) != len(optimizers):
        raise CheckpointError(
            f"the checkpoint has {len(settings)} optimisers, this run {len(optimizers)}; "
            "resume with the configuration that the run was started with"
        )
    for i, (optimizer, saved) in enumerate(zip(optimizers, settings, strict=True)):
        state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in saved["state"].items()}
        prefix = f"optimizer.{i}."
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                number, _, key = name.removeprefix(prefix).partition(".")
                parameter = parameters[int(number)] if int(number) < len(parameters) else tensor
                fits = tensor.shape == parameter.shape
                state.setdefault(int(number), {})[key] = like(tensor, parameter) if fits else tensor
        groups = [
            {k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in group.items()}
            for group in saved["groups"]
        ]
        try:
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except ValueError as error:
            raise CheckpointError(f"optimiser {i} does not fit the checkpoint: {error}") from error


def plain(values: Any) -> Any:
    """The values as they come back from JSON: tuples are lists."""
    return json.loads(json.dumps(values))


def random_state() -> dict[str, torch.Tensor]:
    """State of torch's generators in this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
