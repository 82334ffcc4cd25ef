"""Weights that the configuration asks for as int8, under any of the names that a graph knows them
by: a tied weight is held once. Runs before the rules, which rewrite the uses that bear the names.
"""

from __future__ import annotations

from torch import fx
from torch.nn import functional as F

from ternc.passes.context import Context, weight_name
from ternc.passes.graph import argument
from ternc.passes.rule import Skip
from ternc.passes.weight_expression import WeightExpression, weight_expression
from ternc.policy import marked_int8


def mark_int8(gm: fx.GraphModule, context: Context) -> None:
    """Leaves in `context.int8` which weights of linears and embeddings are asked for as int8."""
    if not context.config.int8:
        return
    for target in (F.linear, F.embedding):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            weight = argument(node, 1, "weight")
            expression = weight_expression(weight)
            if isinstance(expression, Skip):
                continue
            if marked_int8(weight_name(node, weight, expression.inputs), context.config):
                context.int8.add((expression.positions, expression.key))


def is_int8(expression: WeightExpression | Skip, context: Context) -> bool:
    """Whether the weight is asked for as int8 here, or where the same weight is used too."""
    return (
        not isinstance(expression, Skip) and (expression.positions, expression.key) in context.int8
    )
