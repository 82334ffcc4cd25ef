"""norm_quantize(x) and activate_quantize(gate, up) -> integers and scales, in one launch."""

from __future__ import annotations

import dataclasses

import torch

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.fused_rows import activation_rows, norm_rows
from ternc.runtime.kernels.triton.quantize_act import FEW_ROWS, empty_rows, quantize_act
from ternc.runtime.kernels.triton.rotate import COLUMNS, PRECISE_ROWS, Tiling, hadamard
from ternc.runtime.ops import activate_quantize as activate_op
from ternc.runtime.ops import norm_quantize as norm_op
from ternc.runtime.ops.quantize_act import LEVELS

WIDEST = 32768
"""Columns of a row that fits the registers of a program; wider ones go step by step."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How programs walk over rows."""

    warps: int
    stages: int
    resident: int = 0
    """Programs a multiprocessor that walk over all rows; 0: a program a row."""
    ahead: bool = False
    """The next tile is in registers before the one in hand is worked on."""
    registers: int | None = None
    """Bound a thread."""

    def programs(self, rows: int, device: torch.device) -> int:
        most = self.resident * launch.processors(device.index or 0)
        return min(rows, most) if most else rows


STAGED_BYTES = 16 << 10
"""Input bytes of a padded row up to which rows are kept in shared memory ahead of their turn."""


def choose(rows: int, tiling: Tiling, dtype: torch.dtype, inputs: int) -> RowsConfig:
    """Few rows: the latency of one counts; many: their number keeps the processors busy.

    `inputs`: rows of `dtype` that are read for one that is written.
    """
    elements = tiling.rows * tiling.count * COLUMNS
    narrow = dtype != torch.float32
    rotating = 4 if tiling.count <= 4 else 8
    if rows <= FEW_ROWS:
        return RowsConfig(rotating if tiling.block else max(1, min(16, elements // 512)), 1)
    if tiling.block:
        # Registers and programs fill a multiprocessor: no program waits for another to end.
        if rotating == 8:
            return RowsConfig(8, 1, 1, ahead=narrow)
        if not narrow:
            return RowsConfig(4, 1, 2)
        if tiling.count == 1:
            return RowsConfig(4, 1, 4, ahead=True, registers=128)
        if tiling.count == 2:
            return RowsConfig(4, 1, 3, ahead=True, registers=168)
        return RowsConfig(4, 1, 2, ahead=True)
    if narrow and inputs == 1 and elements in (4096, 8192):
        return RowsConfig(4, 1, *((5, True, 96) if elements == 4096 else (4, True)))
    if inputs * dtype.itemsize * elements > STAGED_BYTES:
        return RowsConfig(min(16, max(1, elements // 1024)), 1)
    return RowsConfig(max(1, min(16, elements // 1024)), 3, max(2, min(16, 40960 // elements)))


def norm_quantize(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] -> y (empty unless `keep`), q int8, sx: the signature of the op; one launch."""
    norm_op.check_norm_quantize(
        x, gain, bias, kind, eps, gain_offset, round_first, signs, block, bits, keep
    )
    if x.shape[-1] > WIDEST:
        rest = (kind, eps, gain_offset, round_first, None, 0, bits, True)
        y = norm_op.reference(x, gain, bias, *rest)[0]
        q, sx = quantize_act(hadamard(y, signs, block) if block else y, bits)
        return (y if keep else y.new_empty(0)), q, sx
    y = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    q, sx = _outputs(x)
    if not sx.numel() or not q.numel():
        return y, q, sx.zero_()
    rows = _rows(x)
    tiling = Tiling.of(x.shape[-1], block)
    config = choose(rows.shape[0], tiling, x.dtype, 1)
    norm_rows[(config.programs(rows.shape[0], x.device),)](
        rows,
        rows if gain is None else gain.contiguous(),
        rows if bias is None else bias.contiguous(),
        rows if signs is None else signs.contiguous(),
        y if keep else rows,
        q,
        sx,
        rows.shape[0],
        rows.stride(0),
        eps,
        gain_offset,
        LAYER=kind == "layer",
        GAIN=gain is not None,
        OFFSET=gain_offset != 0.0,
        BIAS=bias is not None,
        ROUND_FIRST=round_first,
        KEEP=keep,
        **_common(rows, signs, tiling, bits, config),
    )
    return y, q, sx


def activate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate, up [..., K] -> q int8, sx: the signature of the op; one launch."""
    activate_op.check_activate_quantize(gate, up, activation, signs, block, bits)
    if gate.shape[-1] > WIDEST:
        h = activate_op.ACTIVATIONS[activation](gate.float()).to(gate.dtype)
        h = h if up is None else h * up
        return quantize_act(hadamard(h, signs, block) if block else h, bits)
    q, sx = _outputs(gate)
    if not sx.numel() or not q.numel():
        return q, sx.zero_()
    rows = _rows(gate)
    up_rows = rows if up is None else _rows(up)
    tiling = Tiling.of(gate.shape[-1], block)
    config = choose(rows.shape[0], tiling, gate.dtype, 1 if up is None else 2)
    activation_rows[(config.programs(rows.shape[0], gate.device),)](
        rows,
        up_rows,
        rows if signs is None else signs.contiguous(),
        q,
        sx,
        rows.shape[0],
        rows.stride(0),
        up_rows.stride(0),
        ACTIVATION=activation,
        UP=up is not None,
        **_common(rows, signs, tiling, bits, config),
    )
    return q, sx


def _outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty q and sx for x [..., K]."""
    q = empty_rows(x.shape, x.device)
    return q, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [M, K], its columns adjacent; a view where one is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _common(
    rows: torch.Tensor,
    signs: torch.Tensor | None,
    tiling: Tiling,
    bits: int,
    config: RowsConfig,
) -> dict[str, object]:
    """Arguments of both kernels."""
    top, least, most = LEVELS[bits]
    dependent = launch.dependent_launch(rows.device)
    return {
        "K": rows.shape[1],
        "SIGNS": signs is not None and tiling.block > 0,
        "BLOCK": tiling.block,
        "BITS": bits,
        "TOP": top,
        "LEAST": least,
        "MOST": most,
        "ROWS": tiling.rows,
        "TILES": tiling.count,
        "STAGES": config.stages,
        "AHEAD": config.ahead,
        "DEPENDENT": dependent,
        "EARLY": rows.shape[0] <= FEW_ROWS,
        "PRECISE": rows.shape[0] <= PRECISE_ROWS,
        "ASM": launch.INLINE_ASM,
        "num_warps": config.warps,
        "maxnreg": config.registers,
        "launch_pdl": dependent,
        **launch.EXACT,
    }
