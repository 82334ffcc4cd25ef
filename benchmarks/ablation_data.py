"""Folder of text files -> bytes on the device: to train on, to choose by, to score on.

FOLDER/**/*valid*           scored, never looked at before
1 in 20 of the other files  the tuning part: learning rates are chosen by it, not by the scores
the rest                    trained on
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from ternc.demo.corpus import HELD_OUT_SHARE, is_held_out
from ternc.errors import TerncError

TUNE = "tune"
"""Name of the part by which learning rates are chosen."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts as uint8 tensors of one device."""

    train: torch.Tensor
    scored: dict[str, torch.Tensor]
    """By name; `TUNE` is one of them."""


def read(folder: Path, others: list[Path], device: str = "cpu") -> Corpus:
    """Text files of a folder, split by name; each of `others` is scored on as well.

    Raises:
        TerncError: nothing to train on or nothing to score on.
    """
    parts = {"train": bytearray(), TUNE: bytearray(), "valid": bytearray()}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        part = "valid" if "valid" in name else TUNE if is_held_out(name) else "train"
        parts[part] += path.read_bytes() + b"\n"
    if not parts[TUNE]:
        cut = len(parts["train"]) - len(parts["train"]) // HELD_OUT_SHARE
        parts[TUNE] = parts["train"][cut:]
        del parts["train"][cut:]
    if not parts["train"] or not parts["valid"]:
        sizes = {name: len(part) for name, part in parts.items()}
        raise TerncError(
            f"{folder}: bytes by part {sizes}; files with 'valid' in the name are scored"
        )
    texts = {name: tensor_of(bytes(part), device) for name, part in parts.items()}
    texts.update({path.stem: tensor_of(path.read_bytes(), device) for path in others})
    return Corpus(texts.pop("train"), texts)


def tensor_of(text: bytes, device: str) -> torch.Tensor:
    """uint8 [bytes] on a device."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


class Windows:
    """Random windows of a text as batches int64 [batch, length + 1], in the order of a seed.

    All starting points of a pass are drawn at once and kept on the text's device: no batch waits
    for the host.
    """

    def __init__(self, text: torch.Tensor, batch: int, length: int, count: int, seed: int) -> None:
        self.text, self.batch, self.length, self.count = text, batch, length, count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        shape, last = (self.count, self.batch, 1), len(self.text) - self.length
        starts = torch.randint(last, shape, generator=self.generator).to(self.text.device)
        reach = torch.arange(self.length + 1, device=self.text.device)
        for rows in starts:
            yield self.text[rows + reach].long()


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, text: torch.Tensor, length: int, windows: int, batch: int
) -> float:
    """Mean bits per byte over at most `windows` evenly spaced windows of `length` bytes."""
    last = len(text) - length - 1
    count = min(windows, last // length + 1)
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()[:, None].to(text.device)
    reach = torch.arange(length + 1, device=text.device)
    total = torch.zeros((), dtype=torch.float64, device=text.device)
    for rows in starts.split(batch):
        ids = text[rows + reach].long()
        logits = model(ids[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return total.item() / (count * length) / math.log(2)
