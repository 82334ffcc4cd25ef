"""Layouts 1, 2, 3: rows of base-3 bytes [P, N, ceil(K/5)], the form at rest. 1.6 bits a trit."""

from __future__ import annotations

import torch

from ternc.formats import trits
from ternc.formats.layout import Layout


class Rows(Layout):
    """Byte = sum over i of (T_p[5 j + i] + 1) 3**i; multipliers stay [N, G]."""

    @property
    def row_dim(self) -> int:
        return 1

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return self.planes, rows, trits.packed_width(columns)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return trits.pack(codes, self.planes)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return trits.unpack(weight.view(self.weight_shape(rows, columns)), columns)

    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        return rows, groups

    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        return multiplier.contiguous()

    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        return multiplier


LAYOUTS = tuple(Rows(planes, f"rows x{planes}", planes, 1) for planes in (1, 2, 3))
