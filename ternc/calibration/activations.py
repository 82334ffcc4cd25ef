"""Model, batches, layer -> the layer's moments, its inputs recomputed from the model as it is now.

A layer in a chain costs one run of its block from kept inputs; any other layer a run of the model
up to it. One block's inputs are kept at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ternc.calibration.batches import HELD_OUT_EVERY, call, counted_rows, held_out
from ternc.calibration.execution import Chain, Execution, Leaves, StopForward, input_of
from ternc.calibration.moments import SplitMoments


class Activations:
    """Inputs of the layers of a model that is being converted from front to back."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], execution: Execution) -> None:
        self._model = model
        self._batches = batches
        self._calls = execution.calls
        self._chains = [_Walk(chain, model, batches) for chain in execution.chains]

    def moments(self, name: str, layer: nn.Module) -> SplitMoments:
        """Moments of the inputs that `layer` gets now. The model must be in eval mode.

        Args:
            name: of the layer, as recorded.
        """
        moments: SplitMoments | None = None
        current = 0
        once = self._calls[name] == 1

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal moments
            x = input_of(args, kwargs)
            if moments is None:
                moments = SplitMoments.empty(x.shape[-1], x.device)
            rows = counted_rows(self._batches[current], x)
            _share_out(moments, rows, current, len(self._batches))
            if once:
                raise StopForward

        run = self._runner(layer)
        handle = layer.register_forward_pre_hook(take, with_kwargs=True)
        try:
            for current in range(len(self._batches)):
                try:
                    run(current)
                except StopForward:
                    continue
        finally:
            handle.remove()
        assert moments is not None, f"{name} was called when the model was recorded"
        return moments

    def _runner(self, layer: nn.Module) -> Callable[[int], Any]:
        for walk in self._chains:
            if (index := walk.find(layer)) is not None:
                walk.go_to(index)
                return walk.run
        return lambda batch: call(self._model, self._batches[batch])


class _Walk:
    """A chain and the inputs of one of its blocks, for every batch. Goes forward only."""

    def __init__(self, chain: Chain, model: nn.Module, batches: Sequence[Any]) -> None:
        self._chain, self._model, self._batches = chain, model, batches
        self._index = 0
        self._inputs: list[Leaves] = []

    def find(self, layer: nn.Module) -> int | None:
        """The block that `layer` is in, unless the walk has passed it."""
        for index in range(self._index, len(self._chain.keys)):
            if any(module is layer for module in self._chain.block(index).modules()):
                return index
        return None

    def go_to(self, index: int) -> None:
        """Computes the inputs of block `index`, through the blocks before as they are now."""
        if not self._inputs:
            self._inputs = [self._capture(batch) for batch in self._batches]
        while self._index < index:
            for batch, inputs in enumerate(self._inputs):
                self._inputs[batch] = self._chain.advance(self._index, inputs)
            self._index += 1

    def run(self, batch: int) -> Any:
        return self._chain.run(self._index, self._inputs[batch])

    def _capture(self, batch: Any) -> Leaves:
        """Inputs of the first block in a call of the model."""
        captured: Leaves = []

        def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.extend(pytree.tree_leaves((args, kwargs)))
            raise StopForward

        handle = self._chain.block(0).register_forward_pre_hook(capture, with_kwargs=True)
        try:
            call(self._model, batch)
        except StopForward:
            pass
        finally:
            handle.remove()
        return captured


def _share_out(moments: SplitMoments, rows: torch.Tensor, batch: int, count: int) -> None:
    """A batch is for fitting or for judging; of a single batch, one row in eight is for judging."""
    if count > 1:
        (moments.held_out if held_out(batch, count) else moments.fitted).add(rows)
        return
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    kept[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
    moments.held_out.add(rows[kept])
    moments.fitted.add(rows[~kept])
