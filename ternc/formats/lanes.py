"""Layouts 11, 12, 13: blocks of rows over 16 vector lanes, four columns a k-step (CPU kernels).

Lane i < 16 and column j < 4 of a k-step share byte 4 i + j of every 64-byte vector, so that one
vector multiplies by the same four activations in all lanes. Row 16 f + i of the block is field f:

    11: 64 rows, 64 B;   field f of 0..3 = code + 1 in bits 2 f, 2 f + 1
    12: 32 rows, 64 B;   field f of 0..1 = code + 4 in nibble f
    13: 128 rows, 320 B; field f of 0..7 = low four bits of code + 13 in nibble f % 2 of vector
        f // 2, then 64 B whose bit f is the fifth bit
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.config import CODE_MAX
from ternc.formats.layout import Layout

LANES = 16
STEP = 4
VECTOR = LANES * STEP
FIELDS = {1: 4, 2: 2, 3: 8}
"""Rows of a block / 16, by planes."""


class Lanes(Layout):
    """Weight [blocks, ceil(K/4), bytes a step], multiplier [blocks, G, rows of a block]."""

    @property
    def block(self) -> int:
        """Rows of a block: 64, 32, 128."""
        return FIELDS[self.planes] * LANES

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        step_bytes = 5 * VECTOR if self.planes == 3 else VECTOR
        return -(-rows // self.block), -(-columns // STEP), step_bytes

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        rows, columns = codes.shape
        blocks, steps, step_bytes = self.weight_shape(rows, columns)
        padded = F.pad(codes, (0, steps * STEP - columns, 0, blocks * self.block - rows))
        # The four columns of a k-step are one int32: fields are assembled four bytes at a time.
        fields = (padded + CODE_MAX[self.planes]).contiguous().view(torch.int32)
        fields = fields.view(blocks, FIELDS[self.planes], LANES, steps)
        vectors = _PACK[self.planes](fields)
        packed = torch.stack(vectors, dim=1).permute(0, 3, 1, 2).contiguous()
        return packed.view(torch.uint8).view(blocks, steps, step_bytes)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        blocks, steps, step_bytes = self.weight_shape(rows, columns)
        words = weight.contiguous().view(blocks, steps, step_bytes).view(torch.int32)
        words = words.view(blocks, steps, step_bytes // VECTOR, LANES)
        vectors = words.permute(2, 0, 3, 1).unbind(0)
        fields = torch.stack(_UNPACK[self.planes](vectors), dim=1)
        codes = fields.view(torch.int8).view(blocks * self.block, steps * STEP)
        return codes[:rows, :columns] - CODE_MAX[self.planes]

    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        return -(-rows // self.block), groups, self.block

    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        rows, groups = multiplier.shape
        blocks, _, block = self.multiplier_shape(rows, groups)
        padded = F.pad(multiplier, (0, 0, 0, blocks * block - rows))
        return padded.view(blocks, block, groups).transpose(1, 2).contiguous()

    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        groups = multiplier.shape[1]
        return multiplier.transpose(1, 2).reshape(-1, groups)[:rows].contiguous()


def _pack_one(fields: torch.Tensor) -> list[torch.Tensor]:
    """Fields int32 [B, 4, 16, S] of bytes below 4 -> one vector [B, 16, S]."""
    f = fields.unbind(1)
    return [f[0] | f[1] << 2 | f[2] << 4 | f[3] << 6]


def _unpack_one(vectors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [vectors[0] >> (2 * f) & 0x03030303 for f in range(FIELDS[1])]


def _pack_two(fields: torch.Tensor) -> list[torch.Tensor]:
    """Fields int32 [B, 2, 16, S] of bytes below 16 -> one vector of nibbles [B, 16, S]."""
    return [fields[:, 0] | fields[:, 1] << 4]


def _unpack_two(vectors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return _nibbles(vectors[0])


def _pack_three(fields: torch.Tensor) -> list[torch.Tensor]:
    """Fields int32 [B, 8, 16, S] of bytes below 32 -> four vectors of nibbles, fifth bits."""
    low = (fields & 0x0F0F0F0F).unbind(1)
    fifth = torch.zeros_like(low[0])
    for f, high in enumerate((fields >> 4 & 0x01010101).unbind(1)):
        fifth |= high << f
    return [low[2 * v] | low[2 * v + 1] << 4 for v in range(4)] + [fifth]


def _unpack_three(vectors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    low = [nibble for vector in vectors[:4] for nibble in _nibbles(vector)]
    return [nibble | (vectors[4] >> f & 0x01010101) << 4 for f, nibble in enumerate(low)]


def _nibbles(vector: torch.Tensor) -> list[torch.Tensor]:
    return [vector & 0x0F0F0F0F, vector >> 4 & 0x0F0F0F0F]


_PACK = {1: _pack_one, 2: _pack_two, 3: _pack_three}
_UNPACK = {1: _unpack_one, 2: _unpack_two, 3: _unpack_three}

LAYOUTS = tuple(Lanes(10 + planes, f"lanes x{planes}", planes, STEP) for planes in (1, 2, 3))
