"""`Quantized` -> the bytes of a GGUF tensor: blocks of codes with one fp16 scale each.

    TQ2_0, TQ1_0   256 trits, 2.06 and 1.69 bits a weight
    Q4_0, Q5_0     32 codes of -8..7, -16..15, 4.5 and 5.5 bits
    Q8_0           32 codes of int8, 8.5 bits

A weight takes the first type whose blocks hold it: codes in range, no block across groups of
different scales, every scale an fp16 number. With multipliers, W = scale * (multiplier * code), the
product is an int8 too, so that Q8_0 with the row's scale holds what the smaller types cannot.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ternc.formats.quantized import Quantized, expand_groups

HALF_ULP = 2.0**-11
"""Largest relative error of a normal number rounded to fp16."""


@dataclasses.dataclass(frozen=True)
class BlockType:
    """How a type of ggml divides and holds rows."""

    name: str
    block: int
    """Columns of a block."""
    least: int
    most: int
    """Codes that it holds."""


TRITS = {"TQ2_0": BlockType("TQ2_0", 256, -1, 1), "TQ1_0": BlockType("TQ1_0", 256, -1, 1)}
OTHERS = (
    BlockType("Q4_0", 32, -8, 7),
    BlockType("Q5_0", 32, -16, 15),
    BlockType("Q8_0", 32, -128, 127),
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A weight as a block type holds it."""

    type: BlockType
    codes: torch.Tensor
    """int8 [N, K]."""
    scales: torch.Tensor
    """fp16 [N, K / block]."""
    exact: bool
    """No scale was rounded."""


def blocks_of(quantized: Quantized, trits: str, round_scales: bool) -> Blocks | None:
    """The weight in the smallest type that holds it, or None where none does.

    Args:
        trits: "TQ2_0" or "TQ1_0", for weights of one plane.
        round_scales: scales of blocks may be rounded to fp16, by at most 1 part in 2,048.
    """
    kinds = (TRITS[trits], *OTHERS)
    for kind in kinds:
        for codes, scales in _readings(quantized, kind.block):
            if (found := _fit(kind, codes, scales, False)) is not None:
                return found
            rounds = round_scales and _fit(kind, codes, scales, True)
            if rounds:
                return rounds
    return None


def _readings(quantized: Quantized, block: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ways to write W = scales [N, blocks] * codes [N, K], fewest values of a code first."""
    rows, columns = quantized.shape
    if columns % block or not columns or quantized.planewise:
        return []
    blocks, group, many = columns // block, quantized.group_size, quantized.multiplier
    row = None if quantized.free_scales else quantized.scale.expand(rows)[:, None]
    if row is not None and many is None:
        return [(quantized.codes, row.expand(rows, blocks))]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    if group % block == 0:
        scales = quantized.scale if row is None or many is None else row * many
        found.append((quantized.codes, expand_groups(scales, group // block, blocks)))
    if row is not None and many is not None:
        product = expand_groups(many, group, columns) * quantized.codes.int()
        found.append((product.to(torch.int8), row.expand(rows, blocks)))
    return found


def _fit(kind: BlockType, codes: torch.Tensor, scales: torch.Tensor, rounds: bool) -> Blocks | None:
    if int(codes.min()) < kind.least or int(codes.max()) > kind.most:
        return None
    half = scales.to(torch.float16)
    difference = (half.float() - scales).abs()
    exact = not bool(difference.any())
    if not exact and not (rounds and bool((difference <= HALF_ULP * scales.abs()).all())):
        return None
    return Blocks(kind, codes, half, exact)


def to_bytes(blocks: Blocks) -> Any:
    """numpy uint8 [N, bytes of a row]."""
    rows = len(blocks.codes)
    codes = blocks.codes.view(rows, -1, blocks.type.block).cpu()
    scales = blocks.scales.contiguous().cpu().view(torch.uint8).view(rows, -1, 2)
    parts = _LAYOUTS[blocks.type.name](codes)
    ahead = blocks.type.name not in TRITS  # of the codes; behind them in types of trits
    whole = torch.cat((scales, *parts) if ahead else (*parts, scales), -1)
    return whole.view(rows, -1).contiguous().numpy()


def _two_bits(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Byte 32 h + i of a block holds trits 128 h + i + 32 n as trit + 1 in bits 2 n, 2 n + 1."""
    digits = (codes + 1).to(torch.uint8).unflatten(-1, (2, 4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((digits << shifts).sum(-2, dtype=torch.uint8).flatten(-2),)


def _base_three(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Five trits a byte, the first one heaviest: of 160 at a stride of 32, of 80 at 16, and four a
    byte of the last 16 at 4. A byte b stands for ceil(256 b / 243).
    """
    digits = (codes + 1).to(torch.int32)
    found = []
    for start, stop, stride in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        part = digits[..., start:stop].unflatten(-1, (-1, stride))
        weight = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)[: part.shape[-2], None]
        found.append((((part * weight).sum(-2) * 256 + 242) // 243).to(torch.uint8))
    return tuple(found)


def _four_bits(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Byte i holds code i + 8 in its low nibble and code 16 + i in its high one."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return (low | high << 4,)


def _five_bits(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fifth bits, eight a byte from the lowest up, then the rest as `_four_bits` has it."""
    digits = (codes + 16).to(torch.uint8)
    low, high = (digits & 15).chunk(2, -1)
    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = ((digits >> 4).unflatten(-1, (4, 8)) << shifts).sum(-1, dtype=torch.uint8)
    return fifth, low | high << 4


def _eight_bits(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (codes.view(torch.uint8),)


_LAYOUTS = {
    "TQ2_0": _two_bits,
    "TQ1_0": _base_three,
    "Q4_0": _four_bits,
    "Q5_0": _five_bits,
    "Q8_0": _eight_bits,
}
