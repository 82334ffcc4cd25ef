"""Projections -> scaled dot product attention -> output projection: one report row a region."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.context import Context
from ternc.passes.graph import calling_module, dotted_path, source_of
from ternc.passes.ternary_call import read
from ternc.reporting import Row

_MAX_STEPS = 64
"""Nodes looked at between attention and a projection: rotary embeddings, norms, cache, views."""


def report_regions(
    gm: fx.GraphModule, context: Context, unfused: Mapping[fx.Node, str] | None = None
) -> None:
    """Adds the row of every attention to the context; changes nothing in the graph.

    Args:
        unfused: products with the values of attention that is left as it is written, and why.
    """
    for node in list(gm.graph.nodes):
        reason = (unfused or {}).get(node)
        if node.target is not F.scaled_dot_product_attention and reason is None:
            continue
        inputs = list(dict.fromkeys(n for arg in node.args[:3] for n in _projections_of(arg)))
        outputs = _projections_after(node)
        context.rows.append(_row(node, inputs, outputs, reason, context))


def _row(
    node: fx.Node, inputs: list[str], outputs: list[str], reason: str | None, context: Context
) -> Row:
    names = [*inputs, *outputs]
    steps = itertools.takewhile(
        lambda step: len(set(step)) == 1, zip(*(name.split(".") for name in names), strict=False)
    )
    path = ".".join(step[0] for step in steps) or calling_module(node) or str(node)

    def short(listed: list[str]) -> str:
        return ", ".join(name.removeprefix(f"{path}.") for name in listed) or "float"

    found = reason is None and bool(names)
    if reason is not None:
        reason = f"attention left as it is written: {reason}"
    elif found:
        reason = "one fused attention between ternary projections"
    return Row(
        name=context.unique_name(path),
        pattern=f"attention: {short(inputs)} -> softmax(q k) v -> {short(outputs)}",
        action="rewritten" if found else "skipped",
        reason=reason or "no projection of this attention is ternary",
    )


def _projections_of(start: object) -> list[str]:
    """Names of the ternary products that an input of attention comes from."""
    names: list[str] = []
    pending: list[object] = [start]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _MAX_STEPS:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op not in ("call_function", "call_method"):
            continue
        source: Any = node.args[0] if node.args else None
        several = read(source) if isinstance(source, fx.Node) else None
        if several is not None and len(several.weights) > 1:
            names.append(_name(source, node.args[1]))
        elif read(node):
            names.append(_name(node, 0))
        else:
            pending.extend(node.all_input_nodes)
    return names


def _projections_after(attention: fx.Node) -> list[str]:
    """Names of the ternary products that read the output of attention through views, and through
    the op that rotates and quantises it.
    """
    pending = [attention]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _MAX_STEPS:
        node = pending.pop(0)
        for user in node.users:
            call = read(user)
            if call is not None and call.x is node:
                return [_name(user, index) for index in range(len(call.weights))]
            if user not in seen and (user.op == "call_method" or _passes_on(user)):
                seen.add(user)
                pending.append(user)
    return []


def _passes_on(node: fx.Node) -> bool:
    """A rotation, a quantisation, or a result of one."""
    ops = torch.ops.ternc
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return source.target is ops.activate_quantize.default
    return node.target in (ops.hadamard, ops.hadamard.default, ops.activate_quantize.default)


def _name(node: fx.Node, index: object) -> str:
    call = read(node)
    assert call is not None and isinstance(index, int)
    site = call.sites[index]
    if site is not None:
        return site.name
    return dotted_path(source_of(call.weights[index])).rpartition(".")[0]
