"""Which kernel and which tile for a call: the tuned table of this GPU, else rules that suit any."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ternc.runtime.kernels.triton import launch, linear_int8
from ternc.runtime.kernels.triton.gemm_config import GemmConfig
from ternc.runtime.kernels.triton.linear_gemv import MAX_CHUNKS, GemvConfig
from ternc.runtime.kernels.triton.weight import Weight

TABLES = Path(__file__).parent.parent / "tuned"

BUCKETS = (8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
"""Largest M of every row of the table; the last row serves every larger M."""


GEMV, INTEGERS, GATED = "gemv", "gemv integers", "gemv gated"
"""Kernels of the table's rows for one token: in general, of integers, of act(gate) * up."""


def unsupported(weight: Weight) -> str | None:
    """Why no kernel here multiplies by this weight, None where one does.

    int8 with groups is no weight that anything here packs (formats/int8.py: a scale a row).
    """
    if weight.layout not in (21, 22, 23, linear_int8.LAYOUT):
        return f"layout {weight.layout} is not one of the CUDA layouts"
    if weight.layout == linear_int8.LAYOUT and weight.group_size:
        return "int8 with groups"
    return None


def gemv_unsupported(weight: Weight, activation_bits: int, integers: bool = False) -> str | None:
    """Why `linear_gemv` does not take this weight and input, None where it does."""
    if activation_bits != 8 and not integers:
        return f"activation_bits={activation_bits}: only 8 are quantised in the prologue"
    if weight.chunks > MAX_CHUNKS:
        return f"in_features={weight.columns} is over {256 * MAX_CHUNKS}"
    if weight.multiplier is not None and weight.group_size % 4:
        return f"group_size={weight.group_size} is not a multiple of 4"
    return None


def gemv_config(weight: Weight, device: torch.device, kind: str = GEMV) -> GemvConfig:
    """Tile of the one-token kernel; a special kind may have one of its own."""
    table = _tuned(device)
    tuned = table.get(table_key(kind, weight)) or table.get(table_key(GEMV, weight))
    return GemvConfig(*tuned) if tuned else default_gemv(weight, device)


def gemm_config(weight: Weight, tokens: int, device: torch.device) -> GemmConfig:
    """Tile and split of the many-token kernel."""
    bucket = next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])
    tuned = _tuned(device).get(table_key(f"gemm {bucket}", weight))
    return GemmConfig(*tuned) if tuned else default_gemm(weight, tokens, device)


def default_gemv(weight: Weight, device: torch.device) -> GemvConfig:
    """32 words a thread and as many again on their way where there are many rows, else 64."""
    words = launch.power_of_two(weight.chunks) * weight.row_bytes // weight.chunks // 4
    warps = 4 if words <= 512 else 8
    resident = 16 // warps
    rows = max(1, launch.power_of_two(32 * 32 * warps // words + 1) // 2)
    if weight.rows > rows * resident * launch.processors(device.index or 0):
        return GemvConfig(rows, warps, resident)
    return GemvConfig(min(2 * rows, 32), warps)


def default_gemm(weight: Weight, tokens: int, device: torch.device) -> GemmConfig:
    """Tiles that fill the processors; long rows are split where the tiles alone do not."""
    processors = launch.processors(device.index or 0)

    def tiles(rows: int, columns: int) -> int:
        return -(-weight.rows // rows) * -(-tokens // columns)

    def split(count: int) -> int:
        return _split(count, weight, processors)

    # Decoding three planes takes the registers that two chunks at once would need.
    single = weight.planes == 3
    stages, step = (4, 1) if single else (3, 2)
    if tokens <= 8:
        return GemmConfig(32, 8, split(tiles(32, 8)), 2, 4, None, step, 2)
    if tokens <= 16:
        return GemmConfig(64, 16, split(tiles(64, 16)), 4, 4, None, step, 2)
    if tokens <= 32 or (tokens <= 64 and not single and tiles(64, 64) < 0.4 * processors):
        return GemmConfig(64, 32, split(tiles(64, 32)), 4, stages, None, step, 2, 0, True)
    # A token tile that is mostly empty costs as much as a full one.
    wide = -(-tokens // 128) * 128 <= 1.3 * tokens or tokens > 512
    if wide and tiles(128, 128) >= 1.5 * processors:
        return GemmConfig(128, 128, 1, 8, 3, 128, 1, 0, 0, True)
    if wide and tiles(64, 128) >= 1.5 * processors:
        return GemmConfig(64, 128, 1, 4, 3, None, 1, 0, 0, True)
    return GemmConfig(64, 64, split(2 * tiles(64, 64)), 4, stages, None, step, 2, 0, True)


def _split(tiles: int, weight: Weight, processors: int) -> int:
    """Parts of K: a power of two; enough for about two programs a processor, of 6 chunks or more;
    16 chunks are not worth a split.
    """
    split = 1
    while tiles * split <= 2 * processors and weight.chunks > 8 * split + 8:
        split *= 2
    return split


def table_path(name: str) -> Path:
    """The file with the table of a GPU, by the name that CUDA gives it."""
    return TABLES / (name.lower().replace(" ", "_") + ".json")


def table_key(kernel: str, weight: Weight) -> str:
    """Line of the table: kernel, rows, columns, planes and kind of groups."""
    return f"{kernel} {weight.rows} {weight.columns} {weight.planes} {weight.groups_kind}"


@functools.cache
def _table(name: str, capability: int, processors: int) -> dict[str, Any]:
    """The table of a GPU by its name, over those of GPUs with as many processors of its kind."""
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for path in sorted(TABLES.glob("*.json")):
        table = json.loads(path.read_text())
        if path == table_path(name):
            own = table["configurations"]
        elif (table["capability"], table["processors"]) == (capability, processors):
            found |= table["configurations"]
    return found | own


@functools.cache
def _device_name(index: int) -> str:
    return "interpreter" if launch.INTERPRETED else torch.cuda.get_device_name(index)


def _tuned(device: torch.device) -> dict[str, Any]:
    index = device.index or 0
    return _table(_device_name(index), launch.capability(index), launch.processors(index))
