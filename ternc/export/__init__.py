"""A packed model -> a file that other programs read: `export(model, "gguf", path)`.

    gguf     llama.cpp: every weight in the smallest type that holds its values exactly
    pt2      torch.export: the whole program with its packed weights, for `load_program`
    bitnet   a folder that transformers loads as a BitNet checkpoint

`compile_step(module, inputs, path)` compiles a step ahead of time for this machine (`step.py`).

What a target cannot hold is an error that says what to do; nothing is rounded unless asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from ternc.errors import InputError
from ternc.export.step import Step, compile_step, load_step
from ternc.export.token_step import TokenStep

__all__ = ["TARGETS", "Step", "TokenStep", "compile_step", "export", "load_program", "load_step"]

TARGETS = ("gguf", "pt2", "bitnet")


def export(model: nn.Module, to: str, path: Path, **options: Any) -> dict[str, Any]:
    """Writes `model`, packed, to `path`; the options are those of the target's `write`.

    Returns:
        What was written, in plain JSON types: "bytes" and what the target tells.

    Raises:
        InputError: no such target, or no packed layer in the model.
        UnsupportedModelError, WeightShapeError: the target cannot hold the model or a weight.
        MissingExtraError: the target needs a package that is not installed.
    """
    from ternc.modules.linear import TernaryLinear
    from ternc.runtime.dynamo import uncompiled

    model = uncompiled(model)
    if to not in TARGETS:
        raise InputError(f"{to!r} is none of the targets {', '.join(TARGETS)}")
    if not any(isinstance(module, TernaryLinear) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no packed layer; pack it with ternc.quantize first"
        )
    return importlib.import_module(f"ternc.export.{to}").write(model, path, **options)


def load_program(path: Path) -> nn.Module:
    """The module of a .pt2 file that `export` wrote; its ops are registered first.

    It reads with torch.export, which is no guard against a file made to harm: open your own.
    """
    from ternc.export.pt2 import load

    return load(path)
