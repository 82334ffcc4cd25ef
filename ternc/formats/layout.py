"""`Layout`: codes int8 [N, K] <-> the bytes one family of kernels reads. One subclass, one file."""

from __future__ import annotations

import abc
import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """A resident byte order of codes and multipliers. Packing is lossless."""

    number: int
    """Argument `layout` of the ops: no cached graph ever feeds a new byte order."""
    name: str
    planes: int
    """Trit planes of the codes: 1, 2 or 3; or INT8."""
    group_multiple: int
    """Group sizes must be a multiple of this."""

    @property
    def row_dim(self) -> int:
        """Dimension of the weight tensor that runs over rows or blocks of rows."""
        return 0

    @abc.abstractmethod
    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the uint8 weight tensor of codes [rows, columns]."""

    @abc.abstractmethod
    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int8 [N, K] -> uint8 of `weight_shape`, on the same device."""

    @abc.abstractmethod
    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """uint8 of `weight_shape` -> codes int8 [N, K]."""

    @abc.abstractmethod
    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        """Shape of the uint8 multiplier tensor of [rows, groups]."""

    @abc.abstractmethod
    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        """Multipliers uint8 [N, G] -> uint8 of `multiplier_shape`."""

    @abc.abstractmethod
    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        """uint8 of `multiplier_shape` -> uint8 [N, G]."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the weight tensor, padding included."""
        return math.prod(self.weight_shape(rows, columns))
