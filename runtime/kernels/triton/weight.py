"""`Weight`: the packed arguments of an op as the Triton kernels read them."""

from __future__ import annotations

import dataclasses

import torch

from ternc.formats import layouts, p256
from ternc.formats.quantized import group_count
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.decode import ANY_GROUPS, HALVES, NO_GROUPS

HALF = p256.CHUNK // 2


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight [N, K] in layout 21, 22, 23 or 28."""

    bytes: torch.Tensor
    """int8 view of the packed bytes."""
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    rows: int
    columns: int
    group_size: int
    layout: int
    stable: bool = False
    """True where nothing wrote the packed tensors since the last launch (launch.py)."""

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor,
        multiplier: torch.Tensor | None,
        out_features: int,
        in_features: int,
        group_size: int,
        layout: int,
    ) -> Weight:
        """From the arguments of an op, about to be launched."""
        return cls(
            bytes=weight.contiguous().view(torch.int8),
            scale=scale.contiguous(),
            multiplier=None if multiplier is None else multiplier.contiguous(),
            rows=out_features,
            columns=in_features,
            group_size=group_size,
            layout=layout,
            stable=launch.stable(weight, multiplier),
        )

    @property
    def planes(self) -> int:
        return layouts.get(self.layout).planes

    @property
    def chunks(self) -> int:
        """Chunks of 256 columns of a row."""
        return -(-self.columns // p256.CHUNK)

    @property
    def row_bytes(self) -> int:
        """Packed bytes of a row."""
        return layouts.get(self.layout).nbytes(1, self.columns)

    @property
    def groups(self) -> int:
        """Groups of a row; 1 where there are none, for index arithmetic."""
        return group_count(self.columns, self.group_size) or 1

    @property
    def groups_kind(self) -> int:
        """How kernels find the multiplier of a code (decode.py)."""
        if self.multiplier is None:
            return NO_GROUPS.value
        return ANY_GROUPS.value if self.group_size % HALF else HALVES.value

    @property
    def halves_a_group(self) -> int:
        """Halves of a chunk that share a multiplier; 1 where that has no meaning."""
        return self.group_size // HALF if self.groups_kind == HALVES.value else 1

    @property
    def paired(self) -> bool:
        """True where every chunk has two multipliers of its own, an aligned int16."""
        own = self.halves_a_group == 1 and self.groups_kind == HALVES.value
        return own and self.groups % 2 == 0 and self.multiplier_or(self.scale).data_ptr() % 2 == 0

    @property
    def free_scales(self) -> bool:
        """True where every group has a scale of its own."""
        return self.scale.dim() == 2

    @property
    def row_scales(self) -> bool:
        return self.scale.numel() == self.rows

    def multiplier_or(self, stand_in: torch.Tensor) -> torch.Tensor:
        """The multipliers, or a tensor that the kernel gets in their place and never reads."""
        return stand_in if self.multiplier is None else self.multiplier
