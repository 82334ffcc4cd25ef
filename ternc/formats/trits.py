"""Codes [N, K] <-> base-3 bytes [P, N, ceil(K/5)]: five trits a byte, the form at rest.

codes = sum over p of 3**(P - 1 - p) T_p;  byte = sum over i of (T_p[5 j + i] + 1) * 3**i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.config import CODE_MAX
from ternc.errors import CheckpointError

TRITS_PER_BYTE = 5
"""3**5 = 243 <= 256."""

BYTE_VALUES = 3**TRITS_PER_BYTE
"""Bytes from here on (243..255) encode nothing."""


def pack(codes: torch.Tensor, planes: int) -> torch.Tensor:
    """Codes int8 [N, K] -> uint8 [P, N, ceil(K/5)]; the pad trit is 0 (digit 1)."""
    rows, columns = codes.shape
    width = packed_width(columns)
    # Code + max is the base-3 number whose digits are T_p + 1: no borrow, since max = sum of 3**i.
    digits = F.pad(codes, (0, width * TRITS_PER_BYTE - columns)) + CODE_MAX[planes]
    digits = digits.to(torch.uint8).view(rows, width, TRITS_PER_BYTE)
    packed = codes.new_empty((planes, rows, width), dtype=torch.uint8)
    for plane in range(planes):
        place = 3 ** (planes - 1 - plane)
        trits = _divide(digits, place) if plane == 0 else _divide(digits, place) % 3
        byte = trits[..., TRITS_PER_BYTE - 1].clone()
        for i in reversed(range(TRITS_PER_BYTE - 1)):
            byte.mul_(3).add_(trits[..., i])
        packed[plane] = byte
    return packed


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Bytes uint8 [P, N, ceil(K/5)] -> codes int8 [N, columns]. An invalid byte gives zeros."""
    _, rows, width = packed.shape
    table = _trit_table(packed.device)
    codes = packed.new_zeros((rows, width * TRITS_PER_BYTE), dtype=torch.int8)
    for plane in packed:
        trits = table.index_select(0, plane.flatten().to(torch.int32))
        codes.mul_(3).add_(trits.view(rows, -1))
    return codes if columns == codes.shape[1] else codes[:, :columns].contiguous()


def planes_of(codes: torch.Tensor, planes: int) -> torch.Tensor:
    """Codes [N, K] of any dtype -> T_p int8 [P, N, K]."""
    digits = codes.to(torch.int16) + CODE_MAX[planes]
    places = [3 ** (planes - 1 - plane) for plane in range(planes)]
    return torch.stack([(digits // place % 3 - 1).to(torch.int8) for place in places])


def packed_width(columns: int) -> int:
    """Bytes of one row of one plane: ceil(K / 5)."""
    return -(-columns // TRITS_PER_BYTE)


def check_bytes(packed: torch.Tensor, name: str) -> None:
    """Raise CheckpointError, naming the tensor, where a byte of `packed` is 243..255."""
    if packed.numel() and int(packed.max()) >= BYTE_VALUES:
        bad = (packed >= BYTE_VALUES).nonzero()
        value = int(packed[tuple(bad[0])])
        raise CheckpointError(
            f"{name}: byte {value} at {bad[0].tolist()} is not five base-3 trits (0 to 242); "
            f"{len(bad):,} bytes of {packed.numel():,} are damaged; save or copy the folder again"
        )


def _trit_table(device: torch.device) -> torch.Tensor:
    """int8 [256, 5]: the trits of every byte; zeros for 243..255."""
    byte = torch.arange(256, device=device)[:, None]
    trits = byte // 3 ** torch.arange(TRITS_PER_BYTE, device=device) % 3 - 1
    return (trits * (byte < BYTE_VALUES)).to(torch.int8)


def _divide(digits: torch.Tensor, place: int) -> torch.Tensor:
    """digits // place for uint8 digits of at most 26, as a multiply and shift (vectorised)."""
    if place == 1:
        return digits
    # 171 / 512 = 1/3 and 57 / 512 = 1/9 within 2**-9: exact floors for 0..26.
    factor = {3: 171, 9: 57}[place]
    return ((digits.to(torch.int16) * factor) >> 9).to(torch.uint8)
