"""A region: the nodes that compute one tensor from another and from nothing else, as a function."""

from __future__ import annotations

import torch
from torch import fx

from ternc.passes.mutation import is_random, shares_storage, writes_in_place, written_by

MAX_NODES = 24


def ancestors(x: fx.Node, limit: int = MAX_NODES) -> list[fx.Node]:
    """x and what it depends on, nearest first, at most `limit`."""
    order, seen = [x], {x}
    for node in order:
        if len(order) >= limit:
            break
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                order.append(source)
    return order


def between(source: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """Nodes that compute x from `source` alone; None if x depends on anything else, on chance, or
    on what some other node writes to one of them.
    """
    found: set[fx.Node] = set()
    pending = [x]
    while pending:
        node = pending.pop()
        if node is source or node in found:
            continue
        if node.op not in ("call_function", "call_method") or len(found) > MAX_NODES:
            return None
        if is_random(node):
            return None
        found.add(node)
        pending.extend(node.all_input_nodes)
    return None if written_outside(found) else found


def steps(x: fx.Node, *sources: fx.Node | None) -> set[fx.Node]:
    """Calls that x depends on, up to `sources`, x among them."""
    found: set[fx.Node] = set()
    pending = [x]
    while pending:
        node = pending.pop()
        if node in found or node in sources or node.op not in ("call_function", "call_method"):
            continue
        found.add(node)
        pending.extend(node.all_input_nodes)
    return found


def written_outside(nodes: set[fx.Node]) -> bool:
    """Whether a call that is none of `nodes` writes in place to what one of them computes."""
    pending, seen = list(nodes), set(nodes)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            if writes_in_place(user) and written_by(user) is node:
                return True
            if shares_storage(user):
                seen.add(user)
                pending.append(user)
    return False


def evaluate(
    source: fx.Node, x: fx.Node, nodes: set[fx.Node], value: torch.Tensor
) -> torch.Tensor | None:
    """x for source = value; None where the code does not take this shape."""
    graph = fx.Graph()
    mapping = {source: graph.placeholder("source")}
    for node in source.graph.nodes:
        if node in nodes:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(mapping[x])
    owner = source.graph.owning_module
    assert owner is not None
    try:
        with torch.no_grad():
            return fx.GraphModule(owner, graph).forward(value.clone())
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
