"""grouped_mm(x, W [E, K, N], offsets) -> ternc::grouped_linear(x, offsets, pack(W)).

Experts whose weights are stacked in one parameter. Experts kept as separate linears need no rule of
their own: `LinearRule` meets each of them. The router is no stack and stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.context import Context, weight_name
from ternc.passes.graph import arguments, example_value, is_tensor
from ternc.passes.rule import Match, Skip
from ternc.passes.weight_expression import WeightExpression, weight_expression
from ternc.passes.weight_site import (
    add_site,
    decide_now,
    packed_inputs,
    replace,
    requires_grad,
)
from ternc.policy import excluded

_GROUPED_PRODUCTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""torch.nn.functional.grouped_mm, torch._grouped_mm, and custom ops that stand in for them."""

PADDED_ROWS = 128
"""As in `ternc::grouped_linear`: no block of packed rows has two experts."""


class ExpertsRule:
    """Runs beside LinearRule: another kind of product with a weight."""

    name = "grouped_mm(x, W, offsets) -> ternc::grouped_linear(x, offsets, pack(W))"

    def match(self, node: fx.Node) -> Match | None:
        if (
            node.op != "call_function"
            or len(arguments(node)) < 2
            or not is_tensor(arguments(node)[1])
        ):
            return None
        if getattr(node.target, "__name__", "").partition(".")[0] not in _GROUPED_PRODUCTS:
            return None
        x, weight = arguments(node)[:2]
        offsets = node.kwargs.get("offs", arguments(node)[2] if len(arguments(node)) > 2 else None)
        parts = {
            "x": x,
            "weight": weight,
            "offsets": offsets,
            "expression": weight_expression(weight),
        }
        return Match(node, parts)

    def check(self, match: Match, context: Context) -> Skip | None:
        expression = match.parts["expression"]
        if isinstance(expression, Skip):
            return expression
        x, weight = example_value(match.parts["x"]), example_value(match.parts["weight"])
        if weight.dim() != 3 or x.dim() != 2 or match.parts["offsets"] is None:
            return Skip("a grouped product that is not rows of x against a stack of experts")
        if context.why_not_move(*expression.inputs):
            return Skip("the model writes to the weight in place")
        if reason := excluded(_name(match), context.config):
            return Skip(reason)
        if context.grad_enabled and requires_grad(expression, context):
            return Skip("in training stacked experts stay floating point")
        return None

    def rewrite(self, match: Match, context: Context) -> Skip | None:
        expression: WeightExpression = match.parts["expression"]
        node, stack = match.root, example_value(match.parts["weight"])
        experts, columns, rows = (int(size) for size in stack.shape)
        evaluate = _stacked(expression)
        decision = decide_now(evaluate, expression.positions, context)
        if isinstance(decision, Skip):
            return decision
        padded = -(-rows // PADDED_ROWS) * PADDED_ROWS
        like = stack.new_empty((experts * padded, columns))
        name = context.unique_name(_name(match))
        site = add_site(name, "stacked experts", like, expression, evaluate, decision, context)
        site.row.shape = (experts * rows, columns)
        site.row.bytes_before = stack.numel() * stack.element_size()
        site.row.bits_per_weight = 8.0 * site.row.bytes_after / max(1, stack.numel())
        packed = packed_inputs(node.graph, context, site, like)
        with node.graph.inserting_before(node):
            new = node.graph.call_function(
                torch.ops.ternc.grouped_linear.default,
                (
                    match.parts["x"],
                    match.parts["offsets"],
                    packed["weight"],
                    packed["scale"],
                    packed.get("multiplier"),
                    experts,
                    rows,
                    site.variant.group_size,
                    context.config.op_activation_bits,
                    site.variant.layout,
                ),
            )
        new.meta["example_value"] = example_value(node)
        new.meta["ternc_stack"] = site
        replace(node, new, self.name)
        return None


def _name(match: Match) -> str:
    inputs = match.parts["expression"].inputs
    source = weight_name(match.root, match.parts["weight"], inputs)
    leaf = inputs[0].name.rstrip("_").rpartition("parameters_")[2]
    return f"{source}.{leaf}" if leaf and not source.endswith(leaf) else source


def _stacked(
    expression: WeightExpression,
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Tensors -> [E * padded N, K]: the experts one below the other, each padded with zero rows."""

    def evaluate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        stack = expression.evaluate(tensors).transpose(-2, -1)
        missing = -stack.shape[1] % PADDED_ROWS
        return F.pad(stack, (0, 0, 0, missing)).flatten(0, 1)

    return evaluate
