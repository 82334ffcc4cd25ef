"""Orthogonal changes of basis that are folded into float weights: x -> x Q, offline alone.

StreamTurn: Q = R G over a whole width, with 1 Q = 1: it commutes with RMSNorm and with LayerNorm.
HeadTurn:   the same R on every head, a list of columns: it commutes with attention weights.

R is the format's `Rotation`; what is folded leaves no trace in the layers but their weights.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from ternc.formats.rotation import Rotation


class Turn(Protocol):
    """An orthogonal Q."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] in a float dtype -> x Q in the same dtype."""


@dataclasses.dataclass(frozen=True)
class StreamTurn:
    """Q = R G: G is the reflection that takes 1 R back to 1, the vector of ones.

    LayerNorm(x) = RMS(x - mean(x)): since the mean is x 1 / K and Q keeps 1, neither has to be
    rewritten, where a plain R would ask for means removed in every producer (SliceGPT, QuaRot).
    """

    rotation: Rotation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.rotation.rotate(x.float())
        ones = torch.ones(x.shape[-1], device=x.device)
        normal = self.rotation.rotate(ones) - ones
        length = normal.square().sum()
        if length == 0:
            return turned.to(x.dtype)
        along = (turned @ normal) * (2.0 / length)
        return torch.addcmul(turned, along.unsqueeze(-1), normal, value=-1.0).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class HeadTurn:
    """R on the columns of each head; columns of no head stay."""

    rotation: Rotation
    heads: tuple[tuple[int, ...], ...]
    """Columns of every head, in the order of its dimensions; no column twice."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        columns = torch.tensor(self.heads, device=x.device)
        turned = x.clone()
        turned[..., columns] = self.rotation.rotate(x[..., columns].float()).to(x.dtype)
        return turned
