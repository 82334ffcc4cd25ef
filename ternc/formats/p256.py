"""Layouts 21, 22, 23: rows cut in chunks of 256 columns, two's complement codes (CUDA kernels).

Column 64 j + k of a chunk (j < 4, k < 64) is field j of byte k, so that one shift and one AND of a
32-bit word give four neighbouring columns of the tensor cores' operand as 2**shift * code:

    21: 64 B a chunk;  bits 2 j, 2 j + 1 of byte k = code mod 4; 64 * code
    22: 128 B a chunk; nibble j % 2 of byte 64 (j // 2) + k = code mod 16; 16 * code
    23: 160 B a chunk; nibbles as in 22 of floor(code / 2), then 32 B whose byte k % 32 holds in
        bit 2 j + k // 32 the lowest bit of code; 8 * code
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.formats.layout import Layout

CHUNK = 256
FIELD = 64
"""Columns of a field of a chunk."""

CHUNK_BYTES = {1: 64, 2: 128, 3: 160}
"""Bytes of a chunk of one row, by planes."""

SHIFT = {1: 6, 2: 4, 3: 3}
"""Decoded bytes are 2**SHIFT * code, by planes."""


class P256(Layout):
    """Weight [N, ceil(K/256), bytes a chunk], pad code 0; multipliers stay [N, G]."""

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, -(-columns // CHUNK), CHUNK_BYTES[self.planes]

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        rows, columns = codes.shape
        _, chunks, _ = self.weight_shape(rows, columns)
        padded = F.pad(codes, (0, chunks * CHUNK - columns))
        # Four columns are one int32: fields are assembled four bytes at a time.
        fields = padded.contiguous().view(torch.int32).view(rows, chunks, 4, FIELD // 4)
        packed = torch.cat(_PACK[self.planes](fields.unbind(2)), dim=2)
        return packed.view(torch.uint8)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        shape = self.weight_shape(rows, columns)
        words = weight.contiguous().view(shape).view(torch.int32)
        fields = torch.stack(_UNPACK[self.planes](words), dim=2)
        decoded = fields.view(torch.int8).view(rows, shape[1] * CHUNK)
        return (decoded >> SHIFT[self.planes])[:, :columns].contiguous()

    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        return rows, groups

    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        return multiplier.contiguous()

    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        return multiplier


def _pack_one(fields: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Four fields int32 [N, C, 16] of bytes -> words [N, C, 16]."""
    bits = [(field & 0x03030303) << (2 * j) for j, field in enumerate(fields)]
    return [bits[0] | bits[1] | bits[2] | bits[3]]


def _unpack_one(words: torch.Tensor) -> list[torch.Tensor]:
    return [words << (6 - 2 * j) & _signed(0xC0C0C0C0) for j in range(4)]


def _pack_two(fields: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    nibbles = [field & 0x0F0F0F0F for field in fields]
    return [nibbles[0] | nibbles[1] << 4, nibbles[2] | nibbles[3] << 4]


def _unpack_two(words: torch.Tensor) -> list[torch.Tensor]:
    low, high = words[..., :16], words[..., 16:32]
    mask = _signed(0xF0F0F0F0)
    return [low << 4 & mask, low & mask, high << 4 & mask, high & mask]


def _pack_three(fields: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    # The bits that a shift brings in from the next byte are masked off.
    halves = _pack_two(tuple(field >> 1 for field in fields))
    lowest = torch.zeros_like(fields[0][..., :8])
    for j, field in enumerate(fields):
        bits = field & 0x01010101
        lowest |= bits[..., :8] << (2 * j) | bits[..., 8:] << (2 * j + 1)
    return [*halves, lowest]


def _unpack_three(words: torch.Tensor) -> list[torch.Tensor]:
    lowest = words[..., 32:]
    fields = []
    for j, nibbles in enumerate(_unpack_two(words)):
        bits = [lowest >> (2 * j + half) & 0x01010101 for half in range(2)]
        fields.append(nibbles | torch.cat(bits, dim=-1) << 3)
    return fields


def _signed(mask: int) -> int:
    """The int32 with these bits."""
    return mask - (1 << 32)


_PACK = {1: _pack_one, 2: _pack_two, 3: _pack_three}
_UNPACK = {1: _unpack_one, 2: _unpack_two, 3: _unpack_three}

LAYOUTS = tuple(P256(20 + planes, f"P256 x{planes}", planes, 1) for planes in (1, 2, 3))
