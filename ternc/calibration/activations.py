"""Model, batches, layer -> the layer's moments, its inputs recomputed from the model as it is now.

A layer in a chain costs one run of its block from kept inputs, and one of a float copy of that
block from the float model's inputs; any other layer costs a run of the model up to it. One block's
inputs, and one float copy, are kept at a time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import HELD_OUT_EVERY, call, counted_rows, held_out
from ternc.calibration.execution import Chain, Execution, Leaves, StopForward, input_of
from ternc.calibration.moments import SplitMoments
from ternc.formats.quantized import Refusal

LEAST_ROWS = 2
"""One row has no covariance."""

NOT_CALLED = Refusal("not called on the calibration data")

_Run = Callable[[], Any]


class Activations:
    """Inputs of the layers of a model that is being converted from front to back."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], execution: Execution) -> None:
        self._model = model
        self._batches = batches
        self._calls = execution.calls
        self._chains = [_Walk(chain, model, batches) for chain in execution.chains]

    def arrive(self, layer: nn.Module) -> None:
        """To be called before `layer`, or any other of its group, is replaced; eval mode."""
        for walk in self._chains:
            if (index := walk.find(layer)) is not None:
                walk.go_to(index)

    def moments(self, name: str, layer: nn.Module) -> SplitMoments | Refusal:
        """Moments of the inputs that `layer` gets now. The model must be in eval mode.

        Args:
            name: of the layer, as recorded.

        Returns:
            Why not, where it gets fewer than `LEAST_ROWS` finite rows to be fitted to, or to be
            judged by: a fit that nothing judges seems to be without error.
        """
        once = self._calls[name] == 1
        walk = next((w for w in self._chains if w.find(layer) is not None), None)
        if walk is not None:
            walk.go_to(walk.find(layer) or 0)
        moments: SplitMoments | None = None
        for index, batch in enumerate(self._batches):
            wanted = None
            if walk is None:
                inputs = _inputs(layer, functools.partial(call, self._model, batch), once)
            else:
                inputs = _inputs(layer, functools.partial(walk.run, index), once)
                original = walk.original(layer)
                wanted = _inputs(original, functools.partial(walk.run_float, index), once)
            if not inputs:
                continue
            rows = torch.cat([counted_rows(batch, x) for x in inputs])
            if moments is None:
                moments = SplitMoments.empty(rows.shape[1], rows.device)
            goals = None if wanted is None else [counted_rows(batch, x) for x in wanted]
            paired = goals is not None and sum(map(len, goals)) == len(rows) and once
            goal = torch.cat(goals) if goals and paired else None
            _share_out(moments, rows, goal, index, len(self._batches))
        if moments is None:
            return NOT_CALLED
        if min(moments.fitted.count, moments.held_out.count) >= LEAST_ROWS:
            return moments
        return Refusal(moments.unusable or "called on the calibration data too rarely to be judged")


def _inputs(layer: nn.Module, run: _Run, once: bool) -> list[torch.Tensor]:
    """What `layer` is given while `run` runs, which ends there if it is called but once."""
    found: list[torch.Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(input_of(args, kwargs).detach())
        if once:
            raise StopForward

    handle = layer.register_forward_pre_hook(take, with_kwargs=True)
    try:
        run()
    except StopForward:
        pass
    finally:
        handle.remove()
    return found


class _Walk:
    """A chain and the inputs of one of its blocks, for every batch. Goes forward only.

    Beside it goes the float model: the same inputs at the first block, then float copies of blocks.
    """

    def __init__(self, chain: Chain, model: nn.Module, batches: Sequence[Any]) -> None:
        self._chain, self._model, self._batches = chain, model, batches
        self._index = 0
        self._inputs: list[Leaves] = []
        self._float_inputs: list[Leaves] = []
        self._float_block: nn.Module | None = None

    def find(self, layer: nn.Module) -> int | None:
        """The block that `layer` is in, unless the walk has passed it."""
        for index in range(self._index, len(self._chain.keys)):
            if any(module is layer for module in self._chain.block(index).modules()):
                return index
        return None

    def go_to(self, index: int) -> None:
        """Computes the inputs of block `index`, through the blocks before as they are now."""
        if self._float_block is None:
            self._inputs = [self._chain.first_inputs(self._model, batch) for batch in self._batches]
            self._float_inputs = list(self._inputs)
            self._float_block = copy.deepcopy(self._chain.block(0))
        while self._index < index:
            here, block = self._index, self._float_block
            for batch in range(len(self._batches)):
                self._inputs[batch] = self._chain.advance(here, self._inputs[batch])
                self._float_inputs[batch] = self._chain.advance(
                    here, self._float_inputs[batch], block
                )
            self._index += 1
            self._float_block = copy.deepcopy(self._chain.block(self._index))

    def run(self, batch: int) -> Any:
        return self._chain.run(self._index, self._inputs[batch])

    def run_float(self, batch: int) -> Any:
        return self._chain.run(self._index, self._float_inputs[batch], self._float_block)

    def original(self, layer: nn.Module) -> nn.Module:
        """The layer of the float copy that `layer` of the block was copied to."""
        assert self._float_block is not None
        block = self._chain.block(self._index)
        path = next(path for path, module in block.named_modules() if module is layer)
        return self._float_block.get_submodule(path)


def _share_out(
    moments: SplitMoments, rows: torch.Tensor, goal: torch.Tensor | None, batch: int, count: int
) -> None:
    """A batch is for fitting or for judging; of a single batch, one row in eight is for judging."""
    if count > 1:
        (moments.held_out if held_out(batch, count) else moments.fitted).add(rows, goal)
        return
    kept = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    kept[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
    for part, chosen in ((moments.held_out, kept), (moments.fitted, ~kept)):
        part.add(rows[chosen], None if goal is None else goal[chosen])
