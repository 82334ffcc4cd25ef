"""torch.fx graph -> plain `GraphNode`s for the report: names, layers and shapes, no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ternc.passes.graph import calling_module, example_value
from ternc.reporting import GraphNode


def describe_graph(graph: fx.Graph, prefix: str = "") -> list[GraphNode]:
    """Every node in order; `prefix` keeps the names of several graphs apart."""
    return [
        GraphNode(
            name=prefix + node.name,
            op=node.op,
            target=node.target if isinstance(node.target, str) else _target_name(node.target),
            inputs=tuple(prefix + source.name for source in node.all_input_nodes),
            layer=calling_module(node) or None,
            value=_value(example_value(node)),
            weight=bool(node.meta.get("ternc_static")) or "ternc_packed" in node.meta,
        )
        for node in graph.nodes
    ]


def prefixed(nodes: Sequence[GraphNode], prefix: str) -> list[GraphNode]:
    """The same nodes under the names that `describe_graph(graph, prefix)` gives."""
    return [
        dataclasses.replace(
            node,
            name=prefix + node.name,
            inputs=tuple(prefix + source for source in node.inputs),
        )
        for node in nodes
    ]


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__name__', str(target))}"


def _value(value: Any) -> str:
    """float32[2, 12, 64] for a tensor, the same in brackets for several, "" where unknown."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"({', '.join(_value(item) for item in value)})"
    return "" if value is None else type(value).__name__
