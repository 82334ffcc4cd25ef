"""Bodies of activation checkpointing, checkpoint(body, x, W): inlined where nothing is
differentiated, so that every rule sees through them; rewritten in their place where something is.

Bodies of other higher-order operators stay as they are (`passes/opaque.py` reports them).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ternc.passes.graph import arguments, copy_graph, is_static_input, source_of


def inline_bodies(gm: fx.GraphModule) -> None:
    """checkpoint(body, *args) -> the nodes of the body: without gradients it is a call."""
    for call, body in list(_checkpoints(gm)):
        attribute = arguments(call)[0]
        inside = dict(
            zip(body.graph.find_nodes(op="placeholder"), arguments(call)[1:], strict=True)
        )
        with gm.graph.inserting_before(call):
            for node in body.graph.nodes:
                if node.op in ("placeholder", "output"):
                    continue
                inside[node] = gm.graph.node_copy(node, inside.__getitem__)
                if node.op == "get_attr":
                    name = f"{attribute.target}_{node.target}"
                    setattr(gm, name, getattr(body, str(node.target)))
                    inside[node].target = name
        outputs = arguments(body.graph.output_node())[0]
        for user in list(call.users):
            user.replace_all_uses_with(inside[outputs[arguments(user)[1]]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)
        if not attribute.users:
            gm.graph.erase_node(attribute)


def own_bodies(gm: fx.GraphModule, tainted: set[fx.Node]) -> list[tuple[fx.Node, fx.GraphModule]]:
    """Every checkpoint with a copy of its body that may be edited and knows what it is given."""
    found = []
    for call, body in list(_checkpoints(gm)):
        copied = copy_graph(body)
        setattr(gm, str(arguments(call)[0].target), copied)
        given = arguments(call)[1:]
        for inner, outer in zip(copied.graph.find_nodes(op="placeholder"), given, strict=True):
            static = isinstance(outer, fx.Node) and is_static_input(outer)
            inner.meta["ternc_static"] = static and outer not in tainted
            if static:
                inner.meta["ternc_position"] = outer.meta["ternc_position"]
                inner.meta["ternc_source"] = source_of(outer)
        call.meta["ternc_body"] = True
        found.append((call, copied))
    return found


def pass_packed(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
    """Hands the packed weights and states that a rewritten body reads through its call, and drops
    what the body reads no more.
    """
    given = list(arguments(call)[1:])
    passed = [arguments(call)[0]]
    for inner in body.graph.find_nodes(op="placeholder"):
        mark = next((mark for mark in _ADDED if mark in inner.meta), None)
        outer = given.pop(0) if mark is None else _added_input(gm.graph, inner, mark)
        if inner.users:
            passed.append(outer)
        else:
            body.graph.erase_node(inner)
    call.args = tuple(passed)
    body.recompile()


_ADDED = ("ternc_packed", "ternc_state")
"""Marks of the inputs that rules add to a graph."""


def _added_input(graph: fx.Graph, inner: fx.Node, mark: str) -> fx.Node:
    """The input of the outer graph for one that a rule added to a body."""
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get(mark) == inner.meta[mark]:
            return node
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(f"{mark}_{len(inputs)}")
    node.meta[mark] = inner.meta[mark]
    node.meta["example_value"] = inner.meta["example_value"]
    return node


def _checkpoints(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Calls of activation checkpointing whose body no other call shares."""
    operator = torch.ops.higher_order.tag_activation_checkpoint
    for call in gm.graph.find_nodes(op="call_function", target=operator):
        attribute = arguments(call)[0]
        if isinstance(attribute, fx.Node) and attribute.op == "get_attr":
            body = getattr(gm, str(attribute.target), None)
            items = all(len(user.args) == 2 and not user.kwargs for user in call.users)
            if isinstance(body, fx.GraphModule) and len(attribute.users) == 1 and items:
                yield call, body
