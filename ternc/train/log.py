"""Rows of numbers -> log.csv, one line on stderr now and then, curves.png, TensorBoard."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ternc.errors import MissingExtraError
from ternc.train.sharding import rank

INTERVAL = 3.0
"""Seconds between two lines of progress."""


class TrainingLog:
    """The history of a run: a list of rows, kept in a CSV file where there is a folder."""

    def __init__(self, folder: Path | None, show: bool | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / "log.csv"
        self._show = sys.stderr.isatty() if show is None else show
        self._last = 0.0

    def add(self, row: Mapping[str, Any], total_steps: int) -> None:
        """Appends a row; columns that a row does not have stay empty."""
        self.rows.append(dict(row))
        self._write()
        now = time.monotonic()
        if self._show and (now - self._last >= INTERVAL or row["step"] >= total_steps):
            self._last = now
            numbers = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key != "step"
            )
            print(
                f"train: step {row['step']} of {total_steps}, {numbers}",
                file=sys.stderr,
                flush=True,
            )

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """The rows of an interrupted run."""
        self.rows = [dict(row) for row in rows]
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with self._path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def tensorboard(folder: str | os.PathLike[str]) -> Callable[[Any, Mapping[str, Any]], None]:
    """A callback of `Trainer` that writes every number of a row as a TensorBoard scalar.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "a TensorBoard log") from error
    writer: Any = None

    def write(_trainer: Any, row: Mapping[str, Any]) -> None:
        nonlocal writer
        if rank() != 0:
            return
        writer = writer or SummaryWriter(folder)
        for name, value in row.items():
            if name != "step" and isinstance(value, float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A PNG with one panel a quantity over the steps.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing training curves") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in ("step", "epoch") and any(isinstance(row.get(key), float) for row in rows)
    ]
    figure, axes = pyplot.subplots(len(keys), 1, figsize=(7, 1.8 * len(keys)), squeeze=False)
    for key, axis in zip(keys, axes[:, 0], strict=True):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), float)]
        axis.plot(*zip(*points, strict=True))
        axis.set_ylabel(key)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
