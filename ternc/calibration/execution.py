"""What a model runs, when, and on which input: one recorded call -> groups of layers, chains.

Layers that are given one and the same tensor are a group: they share its moments. A chain is a
list of modules of which each is fed by the one before (the blocks of a transformer): its blocks can
be run one at a time from kept inputs, instead of the whole model again for every layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ternc.calibration.batches import call

Leaves = list[Any]


class StopForward(BaseException):
    """Ends a forward whose rest is not needed; no `except Exception` of a model swallows it."""


@dataclasses.dataclass
class BlockCall:
    """One call of a block: what went in and what came out, as lists of leaves."""

    inputs: Leaves
    spec: pytree.TreeSpec
    outputs: Leaves


@dataclasses.dataclass(frozen=True)
class Link:
    """Where one input leaf of a block comes from."""

    source: str
    """"output" or "input" of the block before, or "constant"."""
    index: int = 0
    value: Any = None


@dataclasses.dataclass
class Chain:
    """Blocks in order, and how each is fed by the one before."""

    container: nn.Module
    keys: list[str]
    """Names of the blocks in the container: a block that is replaced is found again."""
    specs: list[pytree.TreeSpec]
    links: list[list[Link]]
    """For every block but the first."""

    def block(self, index: int) -> nn.Module:
        found = self.container._modules[self.keys[index]]
        assert found is not None
        return found

    def first_inputs(self, model: nn.Module, batch: Any) -> Leaves:
        """Leaves of the first block in a call of the model, which ends there."""
        captured: Leaves = []

        def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.extend(pytree.tree_leaves((args, kwargs)))
            raise StopForward

        handle = self.block(0).register_forward_pre_hook(capture, with_kwargs=True)
        try:
            call(model, batch)
        except StopForward:
            pass
        finally:
            handle.remove()
        return captured

    def run(self, index: int, inputs: Leaves, block: nn.Module | None = None) -> Any:
        """Calls a block, or `block` in its place, on kept leaves."""
        args, kwargs = pytree.tree_unflatten(inputs, self.specs[index])
        return (block or self.block(index))(*args, **kwargs)

    def advance(self, index: int, inputs: Leaves, block: nn.Module | None = None) -> Leaves:
        """Leaves of block `index` -> leaves of block `index` + 1, by running block `index`."""
        outputs = pytree.tree_leaves(self.run(index, inputs, block))
        return [_follow(link, inputs, outputs) for link in self.links[index]]


@dataclasses.dataclass
class Execution:
    """The order of layers in one call of the model."""

    groups: list[tuple[str, ...]]
    """Names of layers by the tensor they are given, in the order of their first calls."""
    calls: dict[str, int]
    """How often each layer was called; 0 where it was not."""
    chains: list[Chain]


def record(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> Execution:
    """Runs the model on one batch and watches. The model is left as it was.

    Args:
        layers: the linear modules to calibrate, by name.
    """
    inputs: list[tuple[str, torch.Tensor]] = []
    calls = dict.fromkeys(layers, 0)
    containers = list(_containers(model, layers))
    block_calls: dict[nn.Module, list[BlockCall]] = {
        block: [] for container in containers for block in container.children()
    }
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(_noting(name, inputs), with_kwargs=True))
    for block, seen in block_calls.items():
        handles.append(block.register_forward_hook(_keeping(seen), with_kwargs=True))
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, dict[str, None]] = {}
    for name, x in inputs:  # `inputs` keeps every tensor alive: equal ids are one tensor
        if not calls[name]:
            groups.setdefault(id(x), {})[name] = None
        calls[name] += 1
    chains: list[Chain] = []
    taken: set[nn.Module] = set()
    for container in containers:
        if taken.isdisjoint(container.modules()):
            chain = _chain(container, block_calls)
            if chain is not None and _replays(chain, block_calls):
                chains.append(chain)
                taken.update(container.modules())
    return Execution([tuple(names) for names in groups.values()], calls, chains)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input of a linear module from the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


def _noting(name: str, inputs: list[tuple[str, torch.Tensor]]) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((name, input_of(args, kwargs)))

    return note


def _keeping(seen: list[BlockCall]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        seen.append(BlockCall(leaves, spec, pytree.tree_leaves(output)))

    return keep


def _containers(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Lists of modules that hold two or more of the layers, the one that holds most first."""
    wanted = set(layers.values())
    held = {
        module: len(wanted.intersection(module.modules()))
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    found = [module for module, count in held.items() if count > 1]
    yield from sorted(found, key=lambda module: -held[module])


def _chain(container: nn.Module, block_calls: dict[nn.Module, list[BlockCall]]) -> Chain | None:
    """The chain that the recorded calls show, or None where a block is fed in another way."""
    blocks = list(container._modules.items())
    calls = [block_calls[block] for _, block in blocks if block is not None]
    if any(len(seen) != 1 for seen in calls) or len({id(seen) for seen in calls}) != len(calls):
        return None
    links = []
    for (before,), (after,) in itertools.pairwise(calls):
        link = [_link(leaf, index, before) for index, leaf in enumerate(after.inputs)]
        if None in link:
            return None
        links.append(link)
    keys = [key for key, _ in blocks]
    return Chain(container, keys, [seen[0].spec for seen in calls], links)  # type: ignore[arg-type]


def _link(leaf: Any, index: int, before: BlockCall) -> Link | None:
    """Where a leaf comes from; None where it is neither of the block before nor a constant."""
    if leaf is None or isinstance(leaf, (bool, str)):
        return Link("constant", value=leaf)
    if isinstance(leaf, (int, float)):
        same = index < len(before.inputs) and before.inputs[index] == leaf
        return Link("input", index) if same else None
    for source, leaves in (("output", before.outputs), ("input", before.inputs)):
        for position, other in enumerate(leaves):
            if other is leaf:
                return Link(source, position)
    return None


def _follow(link: Link, inputs: Leaves, outputs: Leaves) -> Any:
    if link.source == "constant":
        return link.value
    return (outputs if link.source == "output" else inputs)[link.index]


def _replays(chain: Chain, block_calls: dict[nn.Module, list[BlockCall]]) -> bool:
    """Whether running block after block gives again, bit for bit, what the model computed."""
    (first,) = block_calls[chain.block(0)]
    (last,) = block_calls[chain.block(len(chain.keys) - 1)]
    leaves = first.inputs
    for index in range(len(chain.keys) - 1):
        leaves = chain.advance(index, leaves)
    outputs = pytree.tree_leaves(chain.run(len(chain.keys) - 1, leaves))
    return len(outputs) == len(last.outputs) and all(
        torch.equal(new, old) if isinstance(old, torch.Tensor) else new is old or new == old
        for new, old in zip(outputs, last.outputs, strict=True)
    )
