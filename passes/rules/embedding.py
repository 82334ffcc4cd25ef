"""F.embedding(indices, W) -> ternc::embedding(indices, pack(W)), where the configuration asks."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.context import Context, weight_name
from ternc.passes.graph import argument, example_value
from ternc.passes.int8_weights import is_int8
from ternc.passes.rule import Match, Skip
from ternc.passes.weight_expression import weight_expression
from ternc.passes.weight_site import (
    add_site,
    decide_now,
    packed_inputs,
    replace,
    requires_grad,
)
from ternc.policy import included, marked_int8
from ternc.runtime.ops.definition import FLOAT_TYPES


class EmbeddingRule:
    """On request only (`int8`, `include`): an embedding that nobody names has no row."""

    name = "embedding(i, W) -> ternc::embedding(i, pack(W))"

    def match(self, node: fx.Node) -> Match | None:
        if node.op != "call_function" or node.target is not F.embedding:
            return None
        table = argument(node, 1, "weight")
        return Match(node, {"table": table, "expression": weight_expression(table)})

    def check(self, match: Match, context: Context) -> Skip | None:
        name, expression = _name(match), match.parts["expression"]
        asked = marked_int8(name, context.config) or is_int8(expression, context)
        if not (asked or included(name, context.config)):
            return Skip("an embedding is packed on request only", match.root)
        return None

    def rewrite(self, match: Match, context: Context) -> Skip | None:
        name, table = _name(match), example_value(match.parts["table"])
        expression = match.parts["expression"]
        int8 = is_int8(expression, context)
        decision = _why_not(match, context) or decide_now(
            expression.evaluate, expression.positions, context, int8
        )
        name = context.unique_name(name)
        if isinstance(decision, Skip):
            context.skip(name, "embedding", decision, table)
            return decision
        node, evaluate = match.root, expression.evaluate
        site = add_site(name, "embedding", table, expression, evaluate, decision, context, int8)
        site.row.format = site.row.format.rpartition(" a")[0] or site.row.format
        packed = packed_inputs(node.graph, context, site, table)
        with node.graph.inserting_before(node):
            new = node.graph.call_function(
                torch.ops.ternc.embedding.default,
                (
                    argument(node, 0, "input"),
                    packed["weight"],
                    packed["scale"],
                    packed.get("multiplier"),
                    int(table.shape[0]),
                    int(table.shape[1]),
                    site.variant.group_size,
                    site.variant.layout,
                    table.dtype,
                ),
            )
        new.meta["example_value"] = example_value(node)
        new.meta["ternc_table"] = site
        replace(node, new, self.name)
        return None


def _name(match: Match) -> str:
    expression = match.parts["expression"]
    inputs = [] if isinstance(expression, Skip) else expression.inputs
    return weight_name(match.root, match.parts["table"], inputs)


def _why_not(match: Match, context: Context) -> Skip | None:
    expression, table = match.parts["expression"], example_value(match.parts["table"])
    if isinstance(expression, Skip):
        return expression
    if table.dim() != 2 or table.dtype not in FLOAT_TYPES or 0 in table.shape:
        return Skip(f"the weight is {table.dtype} {list(table.shape)}: no table of floats")
    if argument(match.root, 3, "max_norm") is not None:
        return Skip("max_norm rewrites rows of the weight as they are looked up")
    if context.why_not_move(*expression.inputs):
        return Skip("the model writes to the weight in place")
    if context.grad_enabled and requires_grad(expression, context):
        return Skip("in training embeddings stay floating point")
    return None
