"""A float model <-> a few small files: what a later day needs to go on with the ablation.

Matrices of linears are stored as bf16, which is what autocast rounds them to anyway; the rest as it
is. Low and high bytes are kept apart, so that the exponents compress.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

PIECE = 15 << 20
"""Bytes of a file."""


def export_teacher(model: nn.Module, folder: Path) -> list[Path]:
    """Writes teacher.0.z, teacher.1.z, ... and returns their paths."""
    matrices = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        if name not in matrices:
            parts[f"{name}|whole"] = value
            continue
        words = value.bfloat16().view(torch.uint8).view(*value.shape, 2)
        parts[f"{name}|low"] = words[..., 0].contiguous()
        parts[f"{name}|high"] = words[..., 1].contiguous()
    packed = zlib.compress(save(parts), 6)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, start in enumerate(range(0, len(packed), PIECE)):
        paths.append(folder / f"teacher.{index}.z")
        paths[-1].write_bytes(packed[start : start + PIECE])
    return paths


def import_teacher(folder: Path) -> dict[str, torch.Tensor]:
    """The state_dict of what `export_teacher` wrote.

    Raises:
        FileNotFoundError: there is no piece in the folder.
    """
    pieces = sorted(folder.glob("teacher.*.z"), key=lambda path: int(path.name.split(".")[1]))
    if not pieces:
        raise FileNotFoundError(f"{folder} holds no teacher.*.z")
    state: dict[str, torch.Tensor] = {}
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load(zlib.decompress(b"".join(p.read_bytes() for p in pieces))).items():
        name, part = key.split("|")
        if part == "whole":
            state[name] = value
        else:
            halves.setdefault(name, {})[part] = value
    for name, half in halves.items():
        words = torch.stack((half["low"], half["high"]), -1)
        state[name] = words.view(torch.bfloat16).squeeze(-1).float()
    return state
