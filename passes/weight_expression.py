"""The part of a graph that computes a weight from parameters and buffers alone.

`w + (q(w) - w).detach()` is read as `q(w)`: that is the forward value of the straight-through
idiom, which floating point would otherwise blur by one rounding.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import fx

from ternc.passes.graph import is_static_input
from ternc.passes.mutation import (
    is_random,
    name_of,
    shares_storage,
    writes_in_place,
    written_by,
)
from ternc.passes.rule import Skip

_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, torch.subtract, "sub", "subtract"}
_DETACH = {torch.detach, "detach", torch.Tensor.detach}


class WeightExpression:
    """A weight as a function of static inputs.

    Attributes:
        inputs: placeholders it reads, in graph order.
        positions: their positions among the graph's inputs.
        key: text that identifies the computation; "" where the weight is an input itself.
    """

    def __init__(self, inputs: list[fx.Node], body: fx.GraphModule | None) -> None:
        self.inputs = inputs
        self.positions = tuple(node.meta["ternc_position"] for node in inputs)
        self._body = body
        self.key = "" if body is None else _key_of(body)

    @property
    def is_rearrangement(self) -> bool:
        """The values of one input, perhaps in other places, fewer of them, or cast."""
        if self._body is None:
            return True
        calls = [n for n in self._body.graph.nodes if n.op in ("call_function", "call_method")]
        return len(self.inputs) == 1 and all(shares_storage(call) for call in calls)

    def evaluate(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Value of the weight for `tensors` in the order of `inputs`."""
        if self._body is None:
            return tensors[0].detach()
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            return self._body(*tensors)


def weight_expression(weight: fx.Node) -> WeightExpression | Skip:
    """The expression that computes `weight`, or why it is not one of static inputs alone."""
    if is_static_input(weight):
        if any(writes_in_place(user) and written_by(user) is weight for user in weight.users):
            return Skip("the model writes to the weight in place", weight)
        return WeightExpression([weight], None)
    collected = _collect(weight)
    if isinstance(collected, Skip):
        return collected
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    for node in weight.graph.nodes:
        if node not in collected:
            continue
        if node.op == "placeholder":
            inputs.append(node)
            mapping[node] = graph.placeholder(f"input_{len(inputs) - 1}")
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(mapping[weight])
    _fold_straight_through(graph)
    graph.eliminate_dead_code(is_impure_node=_must_stay)
    owner = weight.graph.owning_module
    assert owner is not None
    return WeightExpression(inputs, fx.GraphModule(owner, graph))


def _collect(weight: fx.Node) -> set[fx.Node] | Skip:
    """Every node that `weight` depends on, in-place writes to those included."""
    collected: set[fx.Node] = set()
    pending = [weight]
    while pending:
        node = pending.pop()
        if node in collected:
            continue
        if reason := _why_not_static(node):
            return Skip(reason, node)
        collected.add(node)
        pending.extend(node.all_input_nodes)
        pending.extend(
            user for user in node.users if writes_in_place(user) and written_by(user) is node
        )
    if not any(node.op == "placeholder" for node in collected):
        return Skip(
            "the weight is a constant of the traced code, not a parameter or buffer", weight
        )
    return collected


def _why_not_static(node: fx.Node) -> str | None:
    if node.op == "placeholder":
        if is_static_input(node):
            return None
        return "the weight is computed from an input of the model, not from parameters alone"
    if node.op == "get_attr":
        return None
    name = name_of(node)
    if is_random(node):
        return f"the weight is computed with the random operation {name!r}"
    if writes_in_place(node) and any(
        source in node.args[:1] for source in node.all_input_nodes if is_static_input(source)
    ):
        return f"the weight is computed with {name!r}, which writes to a parameter in place"
    return None


def _must_stay(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or writes_in_place(node)


def _fold_straight_through(graph: fx.Graph) -> None:
    """a + (b - a).detach() -> b and a - (a - b).detach() -> b."""
    for node in list(graph.nodes):
        value = _straight_through_value(node)
        if value is not None:
            node.replace_all_uses_with(value)
            graph.erase_node(node)


def _straight_through_value(node: fx.Node) -> fx.Node | None:
    if len(node.args) != 2 or node.kwargs or node.op not in ("call_function", "call_method"):
        return None
    left, right = node.args
    if node.target in _ADD:
        for base, correction in ((left, right), (right, left)):
            difference = _detached_difference(correction)
            if difference is not None and difference[1] is base:
                return difference[0]
    if node.target in _SUB:
        difference = _detached_difference(right)
        if difference is not None and difference[0] is left:
            return difference[1]
    return None


def _detached_difference(node: object) -> tuple[fx.Node, fx.Node] | None:
    """(a, b) where `node` is (a - b).detach()."""
    if not isinstance(node, fx.Node) or node.target not in _DETACH or not node.args:
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target not in _SUB or len(inner.args) != 2:
        return None
    a, b = inner.args
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return a, b
    return None


def _text_of(constant: object) -> str:
    """All of a constant, not the few elements that its repr shows."""
    if isinstance(constant, torch.Tensor):
        return f"{constant.dtype}{constant.tolist()}"
    return repr(constant)


def _key_of(body: fx.GraphModule) -> str:
    constants = "".join(
        f"{node.target}:{_text_of(getattr(body, str(node.target), None))}"
        for node in body.graph.nodes
        if node.op == "get_attr"
    )
    return hashlib.sha256((body.code + constants).encode()).hexdigest()[:32]
