"""Building a transformers model from its config.json, with its parameters on the meta device."""

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
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not build a {name}: {error}") from error
    return model.eval()


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
