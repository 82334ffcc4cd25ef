"""What the passes leave alone, and the report rows that say so: graphs of torch.func transforms,
and the bodies of higher-order operators.
"""

from __future__ import annotations

from torch import fx
from torch.nn import functional as F

from ternc.passes.context import Context, weight_name
from ternc.passes.graph import arguments, example_value, is_static_input
from ternc.passes.rule import Skip

_TRANSFORMS = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")


def is_transformed(graph: fx.Graph) -> bool:
    """Whether some part of the graph runs under vmap, grad or jvp: its tensors have more sizes, or
    derivatives, than the graph shows.
    """
    return any(getattr(node.target, "__name__", "") in _TRANSFORMS for node in graph.nodes)


def report_transformed(gm: fx.GraphModule, context: Context) -> None:
    """Adds a row for every linear of a graph that `is_transformed`."""
    why = Skip("inside a transform of torch.func (vmap, grad, jvp)")
    for node in _linears(gm):
        weight = arguments(node)[1]
        _skip(node, weight, why, context)


def report_bodies(gm: fx.GraphModule, context: Context) -> None:
    """Adds a row for every linear in the body of a higher-order operator that was not rewritten."""
    for node in gm.graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(node.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        for user in node.users:
            if "ternc_body" in user.meta:
                continue
            given = [arg for arg in user.all_input_nodes if arg is not node]
            inputs = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=False))
            why = Skip(f"inside the body of {user.target}, which is left as it is")
            for inner in _linears(body):
                _skip(inner, inputs.get(arguments(inner)[1]), why, context)


def _linears(gm: fx.GraphModule) -> list[fx.Node]:
    found = gm.graph.find_nodes(op="call_function", target=F.linear)
    return [node for node in found if len(node.args) > 1 and isinstance(node.args[1], fx.Node)]


def _skip(user: fx.Node, weight: object, why: Skip, context: Context) -> None:
    if isinstance(weight, fx.Node) and is_static_input(weight):
        name = context.unique_name(weight_name(user, weight, [weight]))
        context.skip(name, "linear", why, example_value(weight))
