"""A transformers folder -> the model: from config.json alone, or with its weights mapped.

build:   parameters on the meta device, to be filled from a folder of `ternc.save`
mapped:  parameters that lie in the safetensors files, sharded or not: a weight takes memory
         while it is read, and gives it back
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import CheckpointError, MissingExtraError, UnsupportedModelError

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"


def builder_of(model: nn.Module) -> str | None:
    """Name of the transformers class that builds `model` from config.json, or None."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    name = type(model).__name__
    return name if getattr(transformers, name, None) is type(model) else None


def write_config(model: Any, folder: Path) -> None:
    """Writes config.json, which names the class, and generation_config.json if there is one."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    values["architectures"] = [type(model).__name__]
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        text = model.generation_config.to_json_string(use_diff=False)
        (folder / GENERATION).write_text(text, encoding="utf-8")


def build(name: str, folder: Path) -> nn.Module:
    """The transformers model `name`, in eval mode, without values in its parameters.

    Only classes of transformers itself are made; code in the folder is never run.

    Raises:
        MissingExtraError: transformers is not installed.
        UnsupportedModelError: the installed transformers has no such class.
        CheckpointError: config.json does not describe that class.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"loading a {name}") from error
    cls: Any = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} has no model class {name!r}"
        )
    try:
        config_class: Any = cls.config_class
        config = config_class.from_pretrained(folder, local_files_only=True)
        with parameters_on_meta():
            model = cls(config)
        if (folder / GENERATION).is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever the class makes of a configuration that it does not know
        raise CheckpointError(f"{folder / CONFIG} does not build a {name}: {error}") from error
    return model.eval()


def mapped(name: str, folder: Path) -> nn.Module | None:
    """The float model of a folder of transformers, its weights left in the files.

    Writing to a weight copies it: the files stay as they are.

    Returns:
        None where the files are not safetensors, or hold the weights under other names than the
        model has: `from_pretrained` then knows what to do.

    Raises:
        CheckpointError: a file is damaged, or a weight has another shape than the model's.
    """
    files = _weight_files(folder)
    if not files or "quantization_config" in json.loads((folder / CONFIG).read_text("utf-8")):
        return None
    model: Any = build(name, folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors.update(_mapped_tensors(path))
    try:
        found = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.tie_weights()
    if found.unexpected_keys or any(p.is_meta for p in model.parameters()):
        return None
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names; none where there is none.

    Raises:
        CheckpointError: the index is damaged or names a file that is not in the folder.
    """
    index, single = folder / f"{WEIGHTS}.index.json", folder / WEIGHTS
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    for path in files:
        if path.parent != folder or not path.is_file():
            raise CheckpointError(f"{index} names {path.name!r}, which is not in the folder")
    return files


def _mapped_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers keep their values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
