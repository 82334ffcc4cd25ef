"""Packed model -> a .pt2 file of torch.export: program and packed weights, `ternc::` ops inside.

The weights lie in the layout of the device that they are on: a file for a GPU is written from it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import UnsupportedModelError
from ternc.runtime import ops


class Program(nn.Module):
    """model(**inputs) -> its first tensor: logits, or the last hidden state.

    The names of the inputs are arguments of the program's own signature: torch.export does not
    take free dimensions of `**inputs`.
    """

    def __init__(self, model: nn.Module, names: list[str], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self._options = model, dict(options)
        named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        forward = functools.partial(self.forward)
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward  # type: ignore[method-assign]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        output = self.model(**inputs, **self._options)
        if isinstance(output, torch.Tensor):
            return output
        return output.logits if hasattr(output, "logits") else output[0]


def write(model: nn.Module, path: Path, *, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Exports the forward pass without a cache of keys.

    Args:
        inputs: example inputs by name. Every dimension that the model does not fix stays free.

    Raises:
        UnsupportedModelError: torch.export cannot trace the model.
    """
    known = getattr(model, "config", None)
    options = {"use_cache": False} if hasattr(known, "use_cache") else {}
    program = Program(model, list(inputs), options).eval()
    free = {name: [torch.export.Dim.AUTO] * value.dim() for name, value in inputs.items()}
    try:
        with torch.no_grad():
            exported = torch.export.export(
                program, (), dict(inputs), dynamic_shapes=free, strict=False
            )
    except Exception as error:  # of many kinds: whatever the model's code does
        raise UnsupportedModelError(
            f"{type(model).__name__}: torch.export cannot trace it: {error}"
        ) from error
    torch.export.save(exported, path)
    return {"bytes": path.stat().st_size, "inputs": _shapes(exported, list(inputs))}


def load(path: Path) -> nn.Module:
    """The program as a module: module(**inputs) -> tensor."""
    ops.register()
    return torch.export.load(path).module()


def _shapes(exported: torch.export.ExportedProgram, names: list[str]) -> dict[str, list[str]]:
    """Size of every dimension of the inputs: a number, or the name of a free one."""
    given = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.name in given}
    return {
        name: [str(size) for size in values[place].shape]
        for name, place in zip(names, given, strict=True)
        if isinstance(place, str)
    }
