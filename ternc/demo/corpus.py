"""Source files of the installed Python's standard library -> bytes to train on, bytes held out.

A file is held out by a hash of its path, so the split is the same on every machine that has the
same library and no text is in both parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import torch

from ternc.errors import TerncError

HELD_OUT_SHARE = 20
"""One file in this many is held out."""

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class CorpusError(TerncError):
    """The standard library of this Python holds too little source text to train on."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two byte strings as uint8 tensors [length]."""

    train: torch.Tensor
    held_out: torch.Tensor
    files: int
    """Number of source files, both parts together."""


def read_corpus(folder: Path | None = None, context: int = 256) -> Corpus:
    """Read every source file under `folder` (default: the standard library), tests left out.

    Raises:
        CorpusError: one of the two parts is shorter than `context` + 1 bytes.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    train, held_out = bytearray(), bytearray()
    files = 0
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if _LEFT_OUT.isdisjoint(name.parts):
            files += 1
            part = held_out if is_held_out(name.as_posix()) else train
            part += path.read_bytes() + b"\n"
    if min(len(train), len(held_out)) <= context:
        raise CorpusError(
            f"{folder}: {files} source files, {len(train)} bytes to train on and {len(held_out)} "
            f"held out; the demo needs more than {context} of each"
        )
    return Corpus(_tensor(train), _tensor(held_out), files)


def is_held_out(name: str) -> bool:
    """Whether the file of this path (relative, with forward slashes) is kept for evaluation."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _tensor(text: bytearray) -> torch.Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)
