"""save(model, folder), load(folder): a quantised model as safetensors and JSON. No pickle.

    model.safetensors   every tensor of state_dict at rest, tied ones once; other buffers too
    ternc.json          what the packed modules are, tied names, settings, report rows
    config.json         only for transformers models: how to build the model without a skeleton

A folder is untrusted: sizes, types, names and bytes are checked before anything is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc import pretrained
from ternc.config import Config
from ternc.errors import CheckpointError, UnsupportedModelError
from ternc.manifest import Manifest, PackedModule
from ternc.modules import at_rest
from ternc.modules.attention import TernaryMultiheadAttention
from ternc.modules.conversion import switch_off_fast_paths
from ternc.modules.linear import TernaryLinear
from ternc.modules.skeleton import install, packed_layers
from ternc.modules.ties import memory_key
from ternc.runtime.dynamo import uncompiled

WEIGHTS = "model.safetensors"
MANIFEST = "ternc.json"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model` to `folder`, which is made if need be; other files in it are left alone.

    Every file is written under a temporary name first; the old files are put back when one cannot
    be replaced, so that a failure leaves the folder as it was.

    Args:
        model: a model of `ternc.quantize` (a float model is saved as it is), compiled or not.

    Raises:
        UnsupportedModelError: `model` is not a module, or its state is not made of tensors.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"save takes a torch.nn.Module, not a {type(model).__name__}")
    model = uncompiled(model)
    buffers = _unsaved_buffers(model)
    tensors, aliases = _state(model, buffers)
    manifest = Manifest(
        weights_sha256="",
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        builder=pretrained.builder_of(model),
        config=getattr(model, "_ternc_config", Config()),
        modules=_packed_modules(model),
        attention=[
            path
            for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, TernaryMultiheadAttention)
        ],
        tensors={name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()},
        aliases=aliases,
        buffers=list(buffers),
        rows=list(getattr(model, "_ternc_rows", ())),
    )
    target = Path(folder)
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".ternc-save-", dir=target))
    try:
        _write(tensors, staged / WEIGHTS)
        if manifest.builder:
            pretrained.write_config(model, staged)
        manifest = dataclasses.replace(manifest, weights_sha256=_digest(staged / WEIGHTS))
        (staged / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _replace(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote, bit for bit.

    Args:
        folder: written by `save`. It need not be trusted.
        model: a model of the same structure, float or quantised, on any device or on the meta
            device. Its packed layers are put in place, without fitting, and its tensors are
            replaced. Needed unless the folder holds a transformers model.

    Returns:
        `model`, changed in place (or the one layer that takes its place); without `model`, a new
        one in eval mode.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model; file and key named.
        UnsupportedModelError: `model` is not a module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model= takes a torch.nn.Module, not a {type(model).__name__}")
    inner = None if model is None else uncompiled(model)
    with torch.inference_mode(False), torch.no_grad():
        loaded = _load(Path(folder), inner)
    return model if model is not None and loaded is inner else loaded


def _load(folder: Path, model: nn.Module | None) -> nn.Module:
    manifest = Manifest.read(folder / MANIFEST)
    tensors = _read_tensors(folder / WEIGHTS, manifest)
    if model is None:
        if not manifest.builder:
            raise CheckpointError(
                f"{folder}: the folder does not say how to build {manifest.model_class}; pass "
                "model=, a freshly made model of that class (on the meta device if you like)"
            )
        model = pretrained.build(manifest.builder, folder)
    model = install(model, manifest, folder / MANIFEST)
    _load_state(model, tensors, manifest, folder)
    switch_off_fast_paths(model)
    model._ternc_rows = manifest.rows  # type: ignore[assignment]
    model._ternc_config = manifest.config  # type: ignore[assignment]
    return model


def _unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that state_dict leaves out (rotary frequencies, masks): a constructor on the meta
    device does not make their values, and a cast model holds them rounded."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, TernaryLinear)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def _state(
    model: nn.Module, buffers: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, and for every other name the stored one that it equals by being it."""
    owners: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    packed = _packed_keys(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in {**model.state_dict(), **buffers}.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModelError(
                f"{name!r} in the state_dict is a {type(value).__name__}; a folder holds tensors"
            )
        if value.is_meta:
            raise UnsupportedModelError(f"{name!r} is on the meta device and has no values")
        key = packed.get(name) or memory_key(value)
        if key in owners:
            aliases[name] = owners[key]
            continue
        owners[key] = name
        tensors[name] = value.detach().cpu().contiguous()
    return _separate(tensors), aliases


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors that share a storage with another, overlapping or not."""
    count: dict[int, int] = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()._cdata
        count[storage] = count.get(storage, 0) + 1
    return {
        name: tensor if count[tensor.untyped_storage()._cdata] == 1 else tensor.clone()
        for name, tensor in tensors.items()
    }


def _packed_keys(model: nn.Module) -> dict[str, Any]:
    """state_dict key of a packed weight -> what is equal for layers that share their buffers."""
    return {
        f"{path}.{name}" if path else name: (memory_key(module.packed_weight), name)
        for path, module in packed_layers(model)
        for name in at_rest.NAMES
    }


def _packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    return {
        path: PackedModule(
            shape=(module.out_features, module.in_features),
            planes=module.planes,
            group_size=module.group_size,
            weight_dtype=str(module.weight_dtype),
            transposed=module.transposed,
            bias=module.bias is not None,
            exact=module.exact,
            config=module.config,
        )
        for path, module in packed_layers(model)
    }


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _replace(staged: Path, target: Path) -> None:
    """Moves every staged file to its place; on failure every replaced file is put back."""
    previous = staged / "previous"
    previous.mkdir()
    moved: list[str] = []
    try:
        for path in sorted(staged.iterdir()):
            if path.is_dir():
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())  # a name must not outlive a power cut without its bytes
            moved.append(path.name)
            if (target / path.name).exists():
                os.replace(target / path.name, previous / path.name)
            os.replace(path, target / path.name)
    except BaseException:
        for name in moved:
            if (previous / name).exists():
                os.replace(previous / name, target / name)
            elif not (staged / name).exists():
                (target / name).unlink()
        raise


def _read_tensors(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Every tensor that the manifest names, aliases included, checked against it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if _digest(path) != manifest.weights_sha256:
        raise CheckpointError(
            f"{path} is damaged or of another save: its SHA-256 is not the one in {MANIFEST}"
        )
    try:
        with safe_open(path, "pt") as file:
            # Copies: the file is mapped, and whoever writes to it would write to the model.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    seen = {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    if seen != manifest.tensors:
        name = next(
            n for n in {**seen, **manifest.tensors} if seen.get(n) != manifest.tensors.get(n)
        )
        raise CheckpointError(
            f"{path}: {name!r} is {_show(seen.get(name))}, {MANIFEST} says "
            f"{_show(manifest.tensors.get(name))}"
        )
    for alias, name in manifest.aliases.items():
        tensors[alias] = tensors[name]
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _load_state(
    model: nn.Module, tensors: dict[str, torch.Tensor], manifest: Manifest, folder: Path
) -> None:
    path = folder / WEIGHTS
    held: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        if name in held and not held[name].is_meta:
            tensors[name] = tensor.to(held[name].device)
        if name in held and held[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name!r} is {tensor.dtype}, the model's {held[name].dtype}"
            )
    buffers = {name: tensors.pop(name) for name in manifest.buffers if name in tensors}
    for name, buffer in buffers.items():
        if name not in held or held[name].shape != buffer.shape:
            raise CheckpointError(
                f"{path}: buffer {name!r} {list(buffer.shape)} is not the model's"
            )
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    _tie(model, manifest)
    for name, layer in packed_layers(model):
        layer.exact = manifest.modules[name].exact
    absent = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{path}: {absent[0]!r} of the model is on the meta device and not in the folder "
            f"({len(absent)} in all)"
        )


def _tie(model: nn.Module, manifest: Manifest) -> None:
    """Tied names become one Parameter (or one set of packed buffers) again."""
    for alias, name in manifest.aliases.items():
        owner, _, leaf = alias.rpartition(".")
        first_owner, _, first_leaf = name.rpartition(".")
        module, first = model.get_submodule(owner), model.get_submodule(first_owner)
        if isinstance(module, TernaryLinear) and leaf in at_rest.NAMES:
            if isinstance(first, TernaryLinear) and module is not first:
                module.share_packed(first)
        elif leaf in module._parameters and first_leaf in first._parameters:
            module._parameters[leaf] = first._parameters[first_leaf]


def _all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
