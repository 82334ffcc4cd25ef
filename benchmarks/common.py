"""What benchmarks share: the machine, interleaved rounds, drawn shapes, output.

Weights are rotated over at least `ROTATED` bytes after one untimed rotation, so that no sample
reads a warm weight; contenders take turns in every round, so that a slow spell hits all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tabulate
import torch
from limits import Limits

from ternc.runtime import cpu

ROTATED = 192 << 20
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Contender:
    """One way to do the work: `run(i)` uses the i-th of `copies` copies of its weight."""

    name: str
    run: Callable[[int], torch.Tensor]
    copies: int
    nbytes: int
    """Bytes of weight that one product reads."""
    products: int = 1
    """Products of one call: a sample is its share."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    slow: list[float] = dataclasses.field(default_factory=list)
    """Samples in the slow state of the tile unit; they count only where there are no others."""

    @property
    def best(self) -> float:
        return min(self.seconds or self.slow)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds or self.slow)


def copies_of(nbytes: int) -> int:
    """Copies of a weight that fill `ROTATED` bytes, at least two."""
    return max(2, -(-ROTATED // nbytes))


def interleave(
    contenders: list[Contender], rounds: int, limits: Limits | None = None, nbytes: int = 0
) -> None:
    """Time every contender once a round, after one untimed rotation of each.

    With `limits`, they are sampled in every round (a read of `nbytes`), and the tile unit, if it is
    in use, is probed before and after every contender's turn.
    """
    for contender in contenders:
        for i in range(contender.copies):
            contender.run(i)
    for turn in range(rounds):
        if limits:
            limits.sample(nbytes)
        for contender in contenders:
            if limits:
                limits.settle()
            # The first call of a turn finds the caches full of another contender's data. No probe
            # between the two: it is another thread's, and the core sleeps meanwhile (8 to 50 us).
            fast = limits is None or limits.tiles_are_fast()
            contender.run((2 * turn) % contender.copies)
            start = time.perf_counter()
            contender.run((2 * turn + 1) % contender.copies)
            seconds = (time.perf_counter() - start) / contender.products
            fast = fast and (limits is None or limits.tiles_are_fast())
            (contender.seconds if fast else contender.slow).append(seconds)


@contextlib.contextmanager
def turn(lock: str | None, alone: bool) -> Iterator[None]:
    """Inside, no other process holds the file `lock`, or with `alone` false none of them alone.

    Several benchmarks then compile side by side and are timed one after another. None: no lock.
    """
    if lock is None:
        yield
        return
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def commit() -> str:
    """Hash of the commit, with `+` where the tree differs from it; outside of git $TERNC_COMMIT."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    found = git("rev-parse", "HEAD") or os.environ.get("TERNC_COMMIT", "unknown")
    return found + ("+" if changed else "")


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on and with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit(),
        "cpu": models[0] if models else platform.machine(),
        "isa": cpu.isa(),
        "threads": threads,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def drawn_shapes(count: int) -> list[tuple[int, int]]:
    """(N, K) that nobody tuned for: drawn from the hash of the commit, of any remainder."""
    digest = hashlib.sha256(commit().encode()).digest()
    numbers = [int.from_bytes(digest[i : i + 2], "little") for i in range(0, 4 * count, 2)]
    sizes = [257 + number % 5000 for number in numbers]
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def show(rows: list[dict[str, Any]], facts: dict[str, Any], path: str | None) -> None:
    """Print the table; write rows and machine to `path` as JSON where one is given."""
    print(tabulate.tabulate(rows, headers="keys", floatfmt=".1f"))
    print(json.dumps(facts))
    if path:
        write(rows, facts, path)


def write(rows: list[dict[str, Any]], facts: dict[str, Any], path: str) -> None:
    """The file of `show` alone, for a run that may end early."""
    Path(path).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
