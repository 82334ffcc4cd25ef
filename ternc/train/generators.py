"""`Generators`: what is drawn in a run, so that a resumed one draws as an unbroken one would.

The batches of an epoch depend on the generators as they were at its start, the rest of the run on
those of the moment: a checkpoint has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ternc.train import checkpoint

States = dict[str, torch.Tensor]
"""By the name of the generator, after "now." or "epoch."."""


class Generators:
    """The generators of this process, and the loader's own."""

    def __init__(self) -> None:
        self._loader: torch.Generator | None = None
        self._epoch_start: States = {}
        self._resumed: States | None = None

    def states(self) -> States:
        """Their states now and at the start of the epoch."""
        return {**self._states("now"), **self._epoch_start}

    def resume(self, states: States) -> None:
        """Goes on from what `states` gave, with the next epoch's batches."""
        self._resumed = states

    def batches(self, loader: Any, taken: int) -> Iterator[Any]:
        """The batches of an epoch, of which `taken` were taken before."""
        self._loader = getattr(loader, "generator", None)
        resumed, self._resumed = self._resumed, None
        if resumed:
            self._restore(resumed, "epoch" if taken else "now")
        self._epoch_start = self._states("epoch")
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
        if resumed and taken:
            self._restore(resumed, "now")
        return batches

    def _states(self, moment: str) -> States:
        state = checkpoint.random_state()
        if self._loader is not None:
            state["loader"] = self._loader.get_state()
        return {f"{moment}.{name}": value for name, value in state.items()}

    def _restore(self, states: States, moment: str) -> None:
        own = {name.partition(".")[2]: v for name, v in states.items() if name.startswith(moment)}
        checkpoint.restore_random_state(own)
        if self._loader is not None and "loader" in own:
            self._loader.set_state(own["loader"])
