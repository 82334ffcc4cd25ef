"""Graph nodes -> the JSON that templates/graph.js draws: labels, kinds, inputs by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ternc.reporting import GraphNode, Report

KINDS = {
    "product": "ternary product",
    "norm": "norm, quantises",
    "activation": "activation, quantises",
    "quantise": "quantises",
    "rotation": "rotation",
    "training": "fake-quantised (training)",
    "lookup": "rows of an embedding",
    "attention": "attention",
    "matrix": "product in floating point",
    "other": "other operation",
    "input": "input",
    "output": "output",
    "weight": "weight",
}
"""Kind of a node -> what the page calls it; templates/report.css has a colour for each."""

_PARAMETER = re.compile(r"^.*_(?:parameters|buffers)_|_$")
"""What Dynamo writes around the name of a parameter, `l_self_modules_a_parameters_weight_`."""

_TERNARY_KINDS = (
    ("fake_quantize", "training"),
    ("blend_quantize", "training"),
    ("norm", "norm"),
    ("activate", "activation"),
    ("hadamard", "rotation"),
    ("dequantize", "product"),
    ("quantize", "quantise"),
    ("linear", "product"),
    ("embedding", "lookup"),
    ("attention", "attention"),
)
"""Part of the name of a `ternc::` op -> kind; the first that fits."""

_FLOAT_PRODUCTS = {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "conv1d",
    "conv2d",
    "conv3d",
}


def graph_data(report: Report) -> dict[str, Any]:
    """`kinds`, and the nodes of both graphs."""
    return {
        "kinds": KINDS,
        "before": _nodes(report.nodes_before),
        "after": _nodes(report.nodes),
    }


def kind_of(node: GraphNode) -> str:
    """A key of `KINDS`."""
    if node.op == "placeholder":
        return "weight" if node.weight else "input"
    if node.op == "output":
        return "output"
    if node.op == "get_attr":
        return "weight"
    name = label_of(node)
    if node.value.endswith("[0]"):  # the empty tensor that stands for an absent argument
        return "weight"
    if name.startswith("ternc."):
        return next((kind for part, kind in _TERNARY_KINDS if part in name), "other")
    if "attention" in name:
        return "attention"
    return "matrix" if name in _FLOAT_PRODUCTS else "other"


def label_of(node: GraphNode) -> str:
    """`torch._C._nn.linear` -> `linear`, `ternc.linears.default` -> `ternc.linears`."""
    if node.op not in ("call_function", "call_method"):
        return _PARAMETER.sub("", node.name)
    parts = node.target.split(".")
    return ".".join(parts[:2]) if parts[0] == "ternc" else parts[-1]


def _nodes(nodes: Sequence[GraphNode]) -> list[dict[str, Any]]:
    """Inputs as positions in the list. What takes one result of several is left out: its users
    read the operation itself. So are weights that nothing reads any more; the others belong to the
    layer that reads them first.
    """
    several = {node.name for node in nodes if node.value.startswith("(")}
    taken = {
        node.name: node.inputs[0]
        for node in nodes
        if label_of(node) == "getitem" and len(node.inputs) == 1 and node.inputs[0] in several
    }
    users = {source: node for node in reversed(nodes) for source in node.inputs}
    kept = [
        node
        for node in nodes
        if node.name not in taken and (kind_of(node) != "weight" or node.name in users)
    ]
    positions = {node.name: i for i, node in enumerate(kept)}
    return [
        {
            "name": node.name,
            "label": label_of(node),
            "kind": kind_of(node),
            "target": node.target,
            "layer": _layer(node, users) or "",
            "value": node.value,
            "inputs": _inputs(node, taken, positions),
        }
        for node in kept
    ]


def _layer(node: GraphNode, users: dict[str, GraphNode]) -> str | None:
    kind = kind_of(node)
    return users[node.name].layer if kind == "weight" else None if kind == "input" else node.layer


def _inputs(node: GraphNode, taken: dict[str, str], positions: dict[str, int]) -> list[int]:
    """Positions of what a node reads, each once; a source that is not in the list is left out."""
    sources = dict.fromkeys(taken.get(name, name) for name in node.inputs)
    return [positions[name] for name in sources if name in positions]
