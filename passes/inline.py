"""Writing new nodes by calling ordinary tensor code on proxies that know their example values.

`inline(node, function, *args)` runs `function` on proxies, inserts the nodes it makes before
`node`, and keeps `meta["example_value"]` true, so that the code may ask for dtype, dim() and
static sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ternc.passes.graph import example_value

_STATIC_ATTRIBUTES = ("dtype", "device", "ndim")


class ExampleProxy(fx.Proxy):
    """A proxy that answers questions about its metadata from the example value."""

    def __getattr__(self, name: str) -> Any:
        if name in _STATIC_ATTRIBUTES:
            return getattr(example_value(self.node), name)
        if name == "shape":
            return example_value(self.node).shape
        return super().__getattr__(name)

    def dim(self) -> int:
        return example_value(self.node).dim()

    def size(self, dim: int) -> Any:
        return example_value(self.node).size(dim)

    def is_floating_point(self) -> bool:
        return example_value(self.node).is_floating_point()


class _ExampleTracer(fx.proxy.GraphAppendingTracer):
    """Appends nodes and computes their example values as it goes."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        super().__init__(graph)
        self.like = like

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        carry_provenance(self.like, node)
        node.meta["example_value"] = evaluate_example(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ExampleProxy(node, self)


def evaluate_example(node: fx.Node) -> Any:
    """Runs one call node on the example values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), example_value)
    with _fake_mode(args, kwargs), torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target)
        return node.target(*args, **kwargs)


def _fake_mode(*values: Any) -> FakeTensorMode:
    """The mode of the example values themselves: while a backend runs, Dynamo's current one is
    another.
    """
    for leaf in tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def carry_provenance(source: fx.Node, new: fx.Node) -> None:
    """New nodes keep the module stack and the stack trace of the node they replace."""
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if key in source.meta:
            new.meta.setdefault(key, source.meta[key])


def inline(at: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Result of `function` on proxies of the node arguments, as nodes inserted before `at`."""
    tracer = _ExampleTracer(at.graph, at)

    make_proxy: Any = tracer.proxy

    def to_proxy(value: Any) -> Any:
        return fx.node.map_arg(value, make_proxy)

    with at.graph.inserting_before(at):
        result = function(*to_proxy(args), **to_proxy(kwargs))
    return fx.node.map_aggregate(
        result, lambda value: value.node if isinstance(value, fx.Proxy) else value
    )
