"""Progress of long work: tqdm where it is installed, else a line on stderr every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 3.0
"""Seconds between two lines."""


def track(items: Iterable[T], total: int, label: str, enabled: bool | None = None) -> Iterator[T]:
    """The items, with their progress shown on stderr as they are taken.

    Args:
        total: number of items.
        enabled: None shows it on a terminal only.
    """
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _lines(items, total, label)
        return
    yield from tqdm(items, total=total, desc=label, file=sys.stderr)


def _lines(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= INTERVAL or done == total:
            spent = now - start
            left = f", {spent * (total - done) / done:.0f} s left" if done < total else ""
            print(f"{label}: {done} of {total}, {spent:.0f} s{left}", file=sys.stderr, flush=True)
            last = now
