"""`GemmConfig`: the tile of a product of several tokens (linear_gemm.py), and what tuning tries."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile of the output and how it is computed."""

    rows: int
    """BLOCK_N: weight rows of a tile."""
    tokens: int
    """BLOCK_M: rows of x of a tile."""
    split: int
    """Programs that share the K of a tile."""
    warps: int
    stages: int
    registers: int | None = None
    """Bound a thread, so that two programs share a multiprocessor."""
    step: int = 1
    """Chunks of K an iteration: 2 halve the waits and barriers, for twice the registers."""
    prefetch: int = 0
    """Lines of 128 bytes of every weight row asked into L2 before x is quantised."""
    resident: int = 0
    """0: every tile is split. Else programs a multiprocessor: only the tiles of the last wave,
    which would not fill the processors, are split, and no further than fills them."""
    tensor_map: bool = False
    """q is brought by the copy engine (from Hopper on): no thread holds addresses or copies."""

    group_sums: bool | None = None
    """Multipliers of groups act on int32 sums, else on codes; None: on what is less."""

    @property
    def sums(self) -> bool:
        """True where multipliers of groups act on sums."""
        return self.tokens <= 16 if self.group_sums is None else self.group_sums

    def cut(self, tiles: int, processors: int) -> tuple[int, int]:
        """(tiles that one program each computes, programs that share each of the others)."""
        if not self.resident:
            return (tiles if self.split == 1 else 0), self.split
        wave = self.resident * processors
        rest = tiles % wave
        # All parts of the rest have to run at once.
        split = min(self.split, wave // rest) if rest else 1
        return (tiles - rest, split) if split > 1 else (tiles, 1)


SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)

SPACE = (
    tuple(
        GemmConfig(rows, tokens, split, warps, stages, None, step, prefetch, 0, tokens > 16)
        for rows, tokens, warps, stages, steps, splits in (
            (32, 8, 2, 4, (1, 2), SPLITS),
            (64, 8, 4, 3, (1, 2), SPLITS),
            (32, 16, 2, 4, (1, 2), SPLITS),
            (64, 16, 4, 4, (1, 2), SPLITS),
            (64, 32, 4, 4, (1, 2), SPLITS),
            (64, 32, 4, 3, (2,), SPLITS),
            (128, 32, 8, 3, (1, 2), SPLITS[:4]),
            (64, 64, 4, 4, (1,), SPLITS),
            (64, 64, 4, 3, (1, 2), SPLITS[:4]),
            (128, 64, 8, 3, (1,), SPLITS[:2]),
            (64, 128, 4, 3, (1,), SPLITS[:4]),
        )
        for step in steps
        for split in splits
        for prefetch in (0, 2)
    )
    + tuple(
        GemmConfig(rows, 32, split, rows // 16, 3, None, step, 2, 0, True, True)
        for rows in (64, 128)
        for step in (1, 2)
        for split in SPLITS
    )
    + tuple(
        GemmConfig(128, 128, split, 8, 3, 128, 1, 0, resident, True)
        for split, resident in ((1, 0), (2, 0), (2, 2), (4, 2))
    )
)
"""What tuning tries."""
