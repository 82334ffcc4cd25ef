"""Layouts 8, 18, 28: int8 codes, one a byte; and w [N, K] -> int8 codes with one scale a row.

 8: rows, at rest: codes [N, K]
18: lanes: blocks of 64 rows, 256 B a k-step of 4 columns; byte 64 f + 4 i + j is the code of
    row 16 f + i (f < 4, i < 16), column 4 step + j; as the vectors of lanes.py
28: rows, on CUDA: codes [N, K]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.config import INT8, LARGEST_CODE
from ternc.formats.lanes import LANES, STEP
from ternc.formats.layout import Layout
from ternc.formats.quantized import Quantized

FIELDS = 4
BLOCK = FIELDS * LANES

_ROWS_AT_A_TIME = 4096
"""Rows whose fp32 temporaries are alive together: a large head has hundreds of thousands."""


def fit_int8(w: torch.Tensor) -> Quantized:
    """w [N, K], finite, any float dtype -> codes round_half_even(w / s), s = max|w| / 127 a row.

    Source: symmetric absmax quantisation, the rule of the activations (`ternc::quantize_act`).
    """
    w = w.detach()
    most = LARGEST_CODE[INT8]
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    for first in range(0, w.shape[0], _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        part = w[rows].float()
        step = part.abs().amax(1) / most
        scale[rows] = step
        # A row of zeros, or one so small that its step is zero, has codes 0.
        steps = torch.where(step > 0, step, torch.inf)[:, None]
        codes[rows] = (part / steps).round_().clamp_(-most, most).to(torch.int8)
    return Quantized(codes, scale, None, 0, INT8)


class Int8Rows(Layout):
    """Two's complement codes [N, K]; multipliers stay [N, G]."""

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return rows, columns

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.contiguous().view(torch.uint8)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return weight.contiguous().view(rows, columns).view(torch.int8)

    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        return rows, groups

    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        return multiplier.contiguous()

    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        return multiplier


class Int8Lanes(Layout):
    """Weight [blocks, ceil(K/4), 256], pad code 0; multiplier [blocks, G, 64]."""

    @property
    def block(self) -> int:
        """Rows of a block."""
        return BLOCK

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return -(-rows // BLOCK), -(-columns // STEP), BLOCK * STEP

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        rows, columns = codes.shape
        blocks, steps, step_bytes = self.weight_shape(rows, columns)
        padded = F.pad(codes, (0, steps * STEP - columns, 0, blocks * BLOCK - rows))
        # The four columns of a k-step are one int32.
        words = padded.contiguous().view(torch.int32).view(blocks, BLOCK, steps)
        packed = words.transpose(1, 2).contiguous()
        return packed.view(torch.uint8).view(blocks, steps, step_bytes)

    def unpack(self, weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        blocks, steps, _ = self.weight_shape(rows, columns)
        words = weight.contiguous().view(torch.int32).view(blocks, steps, BLOCK)
        codes = words.transpose(1, 2).reshape(-1).view(torch.int8)
        return codes.view(blocks * BLOCK, steps * STEP)[:rows, :columns].contiguous()

    def multiplier_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        return -(-rows // BLOCK), groups, BLOCK

    def pack_multiplier(self, multiplier: torch.Tensor) -> torch.Tensor:
        rows, groups = multiplier.shape
        blocks, _, _ = self.multiplier_shape(rows, groups)
        padded = F.pad(multiplier, (0, 0, 0, blocks * BLOCK - rows))
        return padded.view(blocks, BLOCK, groups).transpose(1, 2).contiguous()

    def unpack_multiplier(self, multiplier: torch.Tensor, rows: int) -> torch.Tensor:
        groups = multiplier.shape[1]
        return multiplier.transpose(1, 2).reshape(-1, groups)[:rows].contiguous()


LAYOUTS = (
    Int8Rows(8, "rows int8", INT8, 1),
    Int8Lanes(18, "lanes int8", INT8, STEP),
    Int8Rows(28, "rows int8 (CUDA)", INT8, 1),
)
