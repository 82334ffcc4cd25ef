"""`Prefix`: the blocks in front of a layer, skipped while the model is run again and again.

Layers are gone through in the order of execution. Of each chain of blocks one place is kept: what
the block in front of it gives, and what the block behind it is given, on every batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ternc.calibration.batches import call
from ternc.calibration.execution import Chain, record


class Prefix:
    """Front parts of a model that does not change."""

    order: list[str]
    """The layers as the model calls them; those that it does not call last."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any]
    ) -> None:
        """The model must be in eval mode, without gradients."""
        execution = record(model, layers, batches[0])
        called = [name for group in execution.groups for name in group]
        self.order = [*called, *(name for name in layers if name not in set(called))]
        self._fronts = [
            front
            for chain in execution.chains
            if (front := _Front(chain, model, batches)).is_all_that_is_read(model, batches[0])
        ]

    @contextlib.contextmanager
    def skipping(self, layer: nn.Module) -> Iterator[None]:
        """Meanwhile the model may be run on the batches, once each in their order."""
        with contextlib.ExitStack() as stack:
            for front in self._fronts:
                stack.enter_context(front.skipping(layer))
            yield


class _Front:
    """The first blocks of a chain, and what the last of them gives on every batch."""

    def __init__(self, chain: Chain, model: nn.Module, batches: Sequence[Any]) -> None:
        self._chain = chain
        self._blocks = [chain.block(index) for index in range(len(chain.keys))]
        self._inputs = [chain.first_inputs(model, batch) for batch in batches]
        self._given: list[Any] = []
        self._count = 0
        """Blocks that are skipped."""

    def is_all_that_is_read(self, model: nn.Module, batch: Any) -> bool:
        """Whether nothing but the next block reads what a block gives, as seen on one batch."""
        wanted, given, inputs = call(model, batch), None, self._inputs[0]
        for index in range(len(self._blocks) - 1):
            given, inputs = self._chain.step(index, inputs)
        with _giving(self._blocks[:-1], [given]):
            found = call(model, batch)
        return _same(found, wanted)

    @contextlib.contextmanager
    def skipping(self, layer: nn.Module) -> Iterator[None]:
        """As in `Prefix`; nothing is skipped for a layer outside, or before one seen already."""
        blocks = enumerate(self._blocks)
        index = next((i for i, block in blocks if any(m is layer for m in block.modules())), 0)
        if index < self._count or not index:
            yield
            return
        while self._count < index:
            steps = [self._chain.step(self._count, inputs) for inputs in self._inputs]
            self._given = [given for given, _ in steps]
            self._inputs = [inputs for _, inputs in steps]
            self._count += 1
        with _giving(self._blocks[:index], self._given):
            yield


@contextlib.contextmanager
def _giving(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Meanwhile each block gives one output after the other, whatever it is given."""
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = _answers(outputs)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _answers(outputs: Sequence[Any]) -> Callable[..., Any]:
    left = iter(outputs)
    return lambda *args, **kwargs: next(left)


def _same(found: Any, wanted: Any) -> bool:
    """Equal, tensors to the bit."""
    left, right = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )
