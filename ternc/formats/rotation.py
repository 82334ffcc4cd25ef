"""`Rotation`: R = diag(signs) blockdiag(H_b) / sqrt(b), the one rotation of the format.

W x = (W R)(x R): rows of W and rows of x are rotated alike, and R is orthogonal. Stored as
(b, seed): the signs are a function of the seed alone, so that layers that read one input and have
one seed share one rotated input.

Uses the op ternc::hadamard, so `ternc.runtime.ops.register()` must have run.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch

MAX_BLOCK = 4096

_shared: weakref.WeakValueDictionary[tuple[Rotation, int, str], torch.Tensor]
_shared = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Metadata of a rotated weight."""

    block: int
    """b, a power of two that divides the columns."""
    seed: int
    """An int64; `of` reduces other seeds to it."""

    @classmethod
    def of(cls, columns: int, seed: int) -> Rotation:
        """The rotation of rows of `columns`: b is the largest power of two in it, at most 4096."""
        return cls(min(columns & -columns, MAX_BLOCK), _signed(seed % (1 << 64)))

    def signs(self, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """int8 [columns] of +1 and -1: -1 where the top bit of mix(seed + mix(column)) is set.

        mix is the finaliser of SplitMix64 (Steele, Lea and Flood 2014): the same on every device
        and in every version of torch.
        """
        column = torch.arange(columns, dtype=torch.int64, device="cpu")
        mixed = _mix(_mix(column) + self.seed)
        return torch.where(mixed < 0, -1, 1).to(torch.int8).to(device)

    def shared_signs(self, columns: int, device: torch.device) -> torch.Tensor:
        """`signs`, the same tensor for all who hold it; not to be written.

        A compiled graph sees by its identity that several inputs are rotated alike.
        """
        key = (self, columns, str(device))
        found = _shared.get(key)
        if found is None:
            # An inference tensor could never be saved for a backward.
            with torch.inference_mode(False):
                found = self.signs(columns, device)
            if type(found) is torch.Tensor:  # no fake tensor outlives its mode
                _shared[key] = found
        return found

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x [..., K] -> x R, in the dtype of x: weights and inputs alike."""
        signs = self.signs(x.shape[-1], x.device)
        return torch.ops.ternc.hadamard(x, signs, self.block)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `rotate`: x R^T."""
        turned = torch.ops.ternc.hadamard(x, None, self.block)
        return turned * self.signs(x.shape[-1], x.device).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class SharedSigns:
    """Which signs an input of a compiled graph is."""

    rotation: Rotation
    columns: int
    device: str

    def tensor(self) -> torch.Tensor:
        """int8 [columns]."""
        return self.rotation.shared_signs(self.columns, torch.device(self.device))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64 of int64 elements, wrapping; shifts are logical."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
