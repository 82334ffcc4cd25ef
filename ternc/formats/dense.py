"""Layout 14: one plane in 1.6 bits a weight, resident; coded for byte permutations (CPU kernels).

As lanes.py, with blocks of 80 rows: byte 4 i + j of a k-step's 64 holds five trits, those of rows
i, 16 + i, .., 64 + i of the block in column j. Of digits d = trit + 1 and f = d0 + 3 d1 + 9 d2 +
27 d3:

    f < 64:   64 d4 + f              the fifth digit lies in the top two bits as it is
    f >= 64:  192 + 17 d4 + f - 64   top bits 11; bytes from 192 + 51 on stand for zeros

so that one permutation of a table of 64 bytes decodes four digits, and a masked one the rest. At
rest the same trits are base 3 along the columns (rows.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.formats.lanes import LANES, STEP, VECTOR, Lanes

DIGITS = 5
PLAIN = 64
"""Values of four digits that leave the top two bits to the fifth."""
ESCAPE = 192
ESCAPED = 3**4 - PLAIN


class Dense(Lanes):
    """Weight [blocks of 80 rows, ceil(K/4), 64], multiplier [blocks, G, 80]."""

    @property
    def block(self) -> int:
        """Rows of a block."""
        return DIGITS * LANES

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return -(-rows // self.block), -(-columns // STEP), VECTOR

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        rows, columns = codes.shape
        blocks, steps, _ = self.weight_shape(rows, columns)
        padded = F.pad(codes, (0, steps * STEP - columns, 0, blocks * self.block - rows))
        digits = (padded + 1).view(torch.uint8).view(blocks, DIGITS, LANES, steps, STEP)
        four = digits[:, 0] + 3 * digits[:, 1] + 9 * digits[:, 2] + 27 * digits[:, 3]
        fifth = digits[:, 4]
        packed = torch.where(
            four < PLAIN, PLAIN * fifth + four, ESCAPE + ESCAPED * fifth + four - PLAIN
        )
        return packed.permute(0, 2, 1, 3).reshape(blocks, steps, VECTOR)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        blocks, steps, _ = self.weight_shape(rows, columns)
        table = _digits_of_bytes().to(weight.device)
        lanes = weight.reshape(blocks, steps, LANES, STEP).permute(0, 2, 1, 3)
        digits = [table[f][lanes.int()] for f in range(DIGITS)]
        codes = torch.stack(digits, dim=1).view(blocks * self.block, steps * STEP)
        return codes[:rows, :columns].contiguous()


def _digits_of_bytes() -> torch.Tensor:
    """int8 [5, 256]: trit f of every byte."""
    byte = torch.arange(256)
    rest = byte - ESCAPE
    valid = rest < 3 * ESCAPED
    four = torch.where(rest < 0, byte % PLAIN, PLAIN + rest % ESCAPED)
    fifth = torch.where(rest < 0, byte // PLAIN, rest // ESCAPED)
    trits = [four // 3**f % 3 - 1 for f in range(DIGITS - 1)] + [fifth - 1]
    return torch.where(valid, torch.stack(trits), 0).to(torch.int8)


NUMBER = 14
LAYOUTS = (Dense(NUMBER, "dense x1", 1, STEP),)
