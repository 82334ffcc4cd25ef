"""What a model runs, when, and on which input: one recorded call -> groups of layers, chains.

Layers that are given one and the same tensor are a group: they share its moments. A chain is a
list of modules of which each is fed by the one before (the blocks of a transformer): its blocks can
be run one at a time from kept inputs, instead of the whole model again for every layer.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ternc.calibration.batches import call

Leaves = list[Any]


class StopForward(BaseException):
    """Ends a forward whose rest is not needed; no `except Exception` of a model swallows it."""


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
        return self.step(index, inputs, block)[1]

    def step(
        self, index: int, inputs: Leaves, block: nn.Module | None = None
    ) -> tuple[Any, Leaves]:
        """What block `index` gives, and the leaves of block `index` + 1."""
        output = self.run(index, inputs, block)
        outputs = pytree.tree_leaves(output)
        return output, [_follow(link, inputs, outputs) for link in self.links[index]]


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
    inputs = _SeenInputs()
    containers = list(_containers(model, layers))
    links = {container: _Links(container) for container in containers}
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(inputs.noting(name), with_kwargs=True))
    for container, seen in links.items():
        for index, block in enumerate(container.children()):
            handles.append(block.register_forward_hook(seen.noting(index), with_kwargs=True))
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    chains: list[Chain] = []
    taken: set[nn.Module] = set()
    for container in containers:
        if taken.isdisjoint(container.modules()) and (chain := links.pop(container).chain()):
            chains.append(chain)
            taken.update(container.modules())
    calls = {name: inputs.calls.get(name, 0) for name in layers}
    return Execution([tuple(names) for names in inputs.groups], calls, chains)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input of a linear module from the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


class _SeenInputs:
    """Which layers are given one and the same tensor; no tensor is kept alive for that."""

    def __init__(self) -> None:
        self.groups: list[dict[str, None]] = []
        self.calls: dict[str, int] = {}
        self._group_of: dict[int, tuple[weakref.ref[torch.Tensor], dict[str, None]]] = {}

    def noting(self, name: str) -> Callable[..., None]:
        """A forward pre-hook of the layer `name`."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            seen, group = self._group_of.get(id(x), (None, {}))
            if seen is None or seen() is not x:  # new, or at the address of one that is gone
                group = {}
                self._group_of[id(x)] = weakref.ref(x), group
            if name not in self.calls:
                if not group:
                    self.groups.append(group)
                group[name] = None
            self.calls[name] = self.calls.get(name, 0) + 1

        return note


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


class _Links:
    """How the blocks of one container feed each other; of the calls, two at a time are kept."""

    def __init__(self, container: nn.Module) -> None:
        self._container = container
        self._specs: list[pytree.TreeSpec] = []
        self._links: list[list[Link]] = []
        self._first: Leaves = []
        self._inputs: Leaves = []
        self._outputs: Leaves = []
        self._broken = False

    def noting(self, index: int) -> Callable[..., None]:
        """A forward hook of block `index`."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs, spec = pytree.tree_flatten((args, kwargs))
            self._note(index, inputs, spec, pytree.tree_leaves(output))

        return note

    def _note(self, index: int, inputs: Leaves, spec: pytree.TreeSpec, outputs: Leaves) -> None:
        if self._broken or index != len(self._specs):
            self._break()
            return
        if index == 0:
            self._first = inputs
        else:
            found = [self._link(leaf, position) for position, leaf in enumerate(inputs)]
            links = [link for link in found if link is not None]
            if len(links) < len(found):
                self._break()
                return
            self._links.append(links)
        self._specs.append(spec)
        self._inputs, self._outputs = inputs, outputs

    def _break(self) -> None:
        self._broken, self._first, self._inputs, self._outputs = True, [], [], []

    def _link(self, leaf: Any, index: int) -> Link | None:
        """Where a leaf comes from; None where it is neither of the block before nor a constant."""
        if leaf is None or isinstance(leaf, (bool, str)):
            return Link("constant", value=leaf)
        if isinstance(leaf, (int, float)):
            same = index < len(self._inputs) and self._inputs[index] == leaf
            return Link("input", index) if same else None
        for source, leaves in (("output", self._outputs), ("input", self._inputs)):
            for position, other in enumerate(leaves):
                if other is leaf:
                    return Link(source, position)
        return None

    def chain(self) -> Chain | None:
        """The chain, where each block was called once, in order, fed by the one before, and running
        block after block gives again, bit for bit, what the model computed."""
        keys = list(self._container._modules)
        if self._broken or len(self._specs) != len(keys):
            return None
        chain = Chain(self._container, keys, self._specs, self._links)
        leaves, last = self._first, len(keys) - 1
        for index in range(last):
            leaves = chain.advance(index, leaves)
        outputs = pytree.tree_leaves(chain.run(last, leaves))
        same = len(outputs) == len(self._outputs) and all(
            torch.equal(new, old) if isinstance(old, torch.Tensor) else new is old or new == old
            for new, old in zip(outputs, self._outputs, strict=True)
        )
        return chain if same else None


def _follow(link: Link, inputs: Leaves, outputs: Leaves) -> Any:
    if link.source == "constant":
        return link.value
    return (outputs if link.source == "output" else inputs)[link.index]
