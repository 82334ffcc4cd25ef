"""F.linear(x, W(parameters), b) -> ternc::linear(x, packed W, b), or a fake-quantised linear in
training.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from ternc.config import MAX_IN_FEATURES
from ternc.decision import rotation_asked
from ternc.passes.activation_quantizer import unquantized_source
from ternc.passes.casts import cast_before
from ternc.passes.context import Context, weight_name
from ternc.passes.graph import argument, example_value
from ternc.passes.inline import inline
from ternc.passes.int8_weights import is_int8
from ternc.passes.rule import Match, Skip
from ternc.passes.training_site import fake_quantised, why_not_train
from ternc.passes.weight_expression import WeightExpression, weight_expression
from ternc.passes.weight_site import (
    add_site,
    decide_now,
    packed_inputs,
    replace,
    requires_grad,
    rotated,
)
from ternc.policy import excluded
from ternc.site import Decision

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class LinearRule:
    """The rule every weight meets; others run before it to shape its neighbourhood."""

    name = "linear(x, W, b) -> ternc::linear(x, pack(W), b)"

    def match(self, node: fx.Node) -> Match | None:
        if node.op != "call_function" or node.target is not F.linear:
            return None
        weight = argument(node, 1, "weight")
        parts = {
            "x": argument(node, 0, "input"),
            "weight": weight,
            "bias": argument(node, 2, "bias"),
            "expression": weight_expression(weight),
        }
        return Match(node, parts)

    def check(self, match: Match, context: Context) -> Skip | None:
        expression = match.parts["expression"]
        if isinstance(expression, Skip):
            return expression
        weight, x = example_value(match.parts["weight"]), example_value(match.parts["x"])
        if weight.dim() != 2 or weight.dtype not in _FLOATS or x.dtype not in _FLOATS:
            return Skip(
                f"weight {weight.dtype} with {weight.dim()} dimensions, input {x.dtype}: "
                "not a matrix product in float32, bfloat16 or float16"
            )
        if 0 in weight.shape:
            return Skip(f"the weight {list(weight.shape)} has no elements")
        if weight.shape[1] > MAX_IN_FEATURES:
            return Skip(
                f"in_features={weight.shape[1]} exceeds {MAX_IN_FEATURES}: "
                "integer sums would overflow"
            )
        if context.why_not_move(*expression.inputs):
            return Skip("the model writes to the weight in place")
        int8 = is_int8(expression, context)
        if not int8 and (reason := excluded(_name(match), context.config, weight.shape)):
            return Skip(reason)
        if int8 and context.grad_enabled and requires_grad(expression, context):
            return Skip("asked for as int8: in training it stays floating point")
        if context.grad_enabled and requires_grad(expression, context):
            return why_not_train(expression)
        return None

    def rewrite(self, match: Match, context: Context) -> Skip | None:
        expression: WeightExpression = match.parts["expression"]
        name = context.unique_name(_name(match))
        int8 = is_int8(expression, context)
        columns = int(example_value(match.parts["weight"]).shape[1])
        asked = None if int8 else rotation_asked(context.config, columns)
        decision = decide_now(expression.evaluate, expression.positions, context, int8, asked)
        if isinstance(decision, Skip):
            return decision
        if context.grad_enabled and requires_grad(expression, context):
            _rewrite_training(match, context, name, decision)
        else:
            _rewrite_packed(match, context, name, decision, int8)
        return None


def _name(match: Match) -> str:
    return weight_name(match.root, match.parts["weight"], match.parts["expression"].inputs)


def _rewrite_training(match: Match, context: Context, name: str, decision: Decision) -> None:
    """linear(x, W, b) -> the same of x and W fake-quantised, straight-through; of x R and W R where
    the input is rotated.
    """
    node, x, w = match.root, match.parts["x"], match.parts["weight"]
    if decision.rotation is not None:
        x, w = (rotated(node, tensor, decision.rotation) for tensor in (x, w))
    expression = match.parts["expression"]
    x, w = fake_quantised(node, x, w, name, "linear (training)", expression, decision, context)
    replace(node, inline(node, F.linear, x, w, match.parts["bias"]), LinearRule.name)


def _rewrite_packed(
    match: Match, context: Context, name: str, decision: Decision, int8: bool
) -> None:
    node, bits = match.root, context.config.op_activation_bits
    expression: WeightExpression = match.parts["expression"]
    weight = example_value(match.parts["weight"])
    evaluate = expression.evaluate
    site = add_site(name, "linear", weight, expression, evaluate, decision, context, int8)
    packed = packed_inputs(node.graph, context, site, weight)
    x, out = match.parts["x"], example_value(node)
    source = unquantized_source(x, bits) if bits and not context.abstract else None
    if source is not None and source not in context.tainted:
        x, site.own_quantizer = source, True
        site.row.pattern = "activation quantiser + linear"
    if example_value(x).dtype != out.dtype:  # autocast chose another dtype for this linear
        x = cast_before(node, x, out.dtype)
    if site.rotation is not None:
        x = rotated(node, x, site.rotation)
    with node.graph.inserting_before(node):
        new = node.graph.call_function(
            torch.ops.ternc.linear.default,
            (
                x,
                packed["weight"],
                packed["scale"],
                packed.get("multiplier"),
                match.parts["bias"],
                int(weight.shape[0]),
                site.variant.group_size,
                bits,
                site.variant.layout,
            ),
        )
    new.meta["example_value"] = out
    new.meta["ternc_site"] = site
    replace(node, new, LinearRule.name)
