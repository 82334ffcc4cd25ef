"""grouped_mm(x, W [E, K, N], offsets) -> ternc::grouped_linear(x, offsets, pack(W)), and the same
for bmm(x [E, M, K], W), whose experts have M rows each.

Experts whose weights are stacked in one parameter. Experts kept as separate linears need no rule of
their own: `LinearRule` meets each of them. The router is no stack and stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.casts import cast_before
from ternc.passes.context import Context, weight_name
from ternc.passes.graph import arguments, example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import TernaryCall, write
from ternc.passes.training_site import fake_quantised, why_not_train
from ternc.passes.weight_expression import WeightExpression, weight_expression
from ternc.passes.weight_site import (
    add_site,
    decide_now,
    packed_inputs,
    replace,
    requires_grad,
)
from ternc.policy import excluded
from ternc.site import Decision

_GROUPED_PRODUCTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
"""torch.nn.functional.grouped_mm, torch._grouped_mm, and custom ops that stand in for them."""

PADDED_ROWS = 128
"""As in `ternc::grouped_linear`: no block of packed rows has two experts."""


class ExpertsRule:
    """Runs beside LinearRule: another kind of product with a weight."""

    name = "grouped_mm(x, W, offsets) -> ternc::grouped_linear(x, offsets, pack(W))"

    def match(self, node: fx.Node) -> Match | None:
        if node.op not in ("call_function", "call_method") or len(arguments(node)) < 2:
            return None
        x, weight = arguments(node)[:2]
        if not (is_tensor(x) and is_tensor(weight)):
            return None
        grouped = _name_of(node) in _GROUPED_PRODUCTS
        if not grouped and (node.target not in (torch.bmm, "bmm") or node.kwargs):
            return None
        expression = weight_expression(weight)
        if not grouped and isinstance(expression, Skip):
            return None  # a product of two activations
        offsets = None
        if grouped:
            offsets = node.kwargs.get("offs", (*arguments(node), None)[2])
        parts = {"x": x, "weight": weight, "offsets": offsets, "grouped": grouped}
        return Match(node, {**parts, "expression": expression})

    def check(self, match: Match, context: Context) -> Skip | None:
        expression, grouped = match.parts["expression"], match.parts["grouped"]
        if isinstance(expression, Skip):
            return expression
        x, weight = example_value(match.parts["x"]), example_value(match.parts["weight"])
        wrong = grouped and (x.dim() != 2 or match.parts["offsets"] is None)
        if weight.dim() != 3 or wrong:
            return Skip("a grouped product that is not rows of x against a stack of experts")
        if context.why_not_move(*expression.inputs):
            return Skip("the model writes to the weight in place")
        if reason := excluded(_name(match), context.config):
            return Skip(reason)
        if context.grad_enabled and requires_grad(expression, context):
            return why_not_train(expression)
        return None

    def rewrite(self, match: Match, context: Context) -> Skip | None:
        expression: WeightExpression = match.parts["expression"]
        decision = decide_now(_stacked(expression), expression.positions, context)
        if isinstance(decision, Skip):
            return decision
        name = context.unique_name(_name(match))
        if context.grad_enabled and requires_grad(expression, context):
            _rewrite_training(match, context, name, decision)
        else:
            _rewrite_packed(match, context, name, decision)
        return None


def _rewrite_training(match: Match, context: Context, name: str, decision: Decision) -> None:
    """grouped_mm(x, W) -> grouped_mm(fake-quantised x, fake-quantised W), straight-through."""
    node, expression = match.root, match.parts["expression"]
    stack = example_value(match.parts["weight"])
    experts, columns, rows = (int(size) for size in stack.shape)
    flat = inline(node, lambda w: w.transpose(-2, -1).flatten(0, 1), match.parts["weight"])
    pattern = "stacked experts (training)"
    x, flat = fake_quantised(
        node, match.parts["x"], flat, name, pattern, expression, decision, context
    )

    def stacked(w: Any) -> Any:
        return w.view(experts, rows, columns).transpose(-2, -1)

    node.args = (x, inline(node, stacked, flat), *arguments(node)[2:])


def _rewrite_packed(match: Match, context: Context, name: str, decision: Decision) -> None:
    node, stack = match.root, example_value(match.parts["weight"])
    expression: WeightExpression = match.parts["expression"]
    experts, columns, rows = (int(size) for size in stack.shape)
    like = stack.new_empty((experts * -(-rows // PADDED_ROWS) * PADDED_ROWS, columns))
    evaluate = _stacked(expression)
    site = add_site(
        name, "stacked experts", like, expression, evaluate, decision, context, stacked=True
    )
    site.row.shape = (experts * rows, columns)
    site.row.bytes_before = stack.numel() * stack.element_size()
    site.row.bits_per_weight = 8.0 * site.row.bytes_after / max(1, stack.numel())
    packed = packed_inputs(node.graph, context, site, like)
    x, dtype = match.parts["x"], example_value(node).dtype
    if example_value(x).dtype != dtype:  # autocast chose another dtype for this product
        x = cast_before(node, x, dtype)
    call = TernaryCall(
        x=x,
        sx=None,
        weights=[packed["weight"]],
        scales=[packed["scale"]],
        multipliers=[packed.get("multiplier")],
        biases=[None],
        residual=None,
        out_features=[rows],
        group_sizes=[site.variant.group_size],
        bits=context.config.op_activation_bits,
        layouts=[site.variant.layout],
        dtype=dtype,
        sites=[site],
        experts=experts,
        offsets=match.parts["offsets"],
    )
    (new,) = write(call, node, node, ExpertsRule.name)
    replace(node, new, ExpertsRule.name)


def _name_of(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "").partition(".")[0]


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
