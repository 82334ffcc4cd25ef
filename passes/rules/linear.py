"""F.linear(x, W(parameters), b) -> ternc::linear(x, packed W, b), or a fake-quantised linear in
training.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import fx
from torch.nn import functional as F

from ternc.config import MAX_IN_FEATURES
from ternc.decision import decide
from ternc.formats import layouts
from ternc.formats.layouts import at_rest_layout, resident_layout
from ternc.formats.quantized import group_count
from ternc.passes.activation_quantizer import unquantized_source
from ternc.passes.context import Context, weight_name
from ternc.passes.graph import argument, example_value
from ternc.passes.inline import carry_provenance, inline
from ternc.passes.rule import Match, Skip
from ternc.passes.weight_expression import WeightExpression, weight_expression
from ternc.policy import excluded
from ternc.reporting import Row
from ternc.site import Decision, Variant, WeightSite

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_PLANES = 3


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
        if weight.shape[1] > MAX_IN_FEATURES:
            return Skip(
                f"in_features={weight.shape[1]} exceeds {MAX_IN_FEATURES}: "
                "integer sums would overflow"
            )
        if reason := excluded(_name(match), context.config):
            return Skip(reason)
        if (
            context.grad_enabled
            and _requires_grad(expression, context)
            and not expression.is_identity
        ):
            return Skip("in training the model's own weight quantiser or reparametrisation is kept")
        return None

    def rewrite(self, match: Match, context: Context) -> Skip | None:
        expression: WeightExpression = match.parts["expression"]
        name = context.unique_name(_name(match))
        rule = partial(decide, config=context.config)
        decision = _decide_now(expression, context, rule)
        if isinstance(decision, Skip):
            return decision
        if context.grad_enabled and _requires_grad(expression, context):
            _rewrite_training(match, context, name, decision)
        else:
            _rewrite_packed(match, context, name, decision, rule)
        return None


def _name(match: Match) -> str:
    return weight_name(match.root, match.parts["weight"], match.parts["expression"].inputs)


def _requires_grad(expression: WeightExpression, context: Context) -> bool:
    return any(context.inputs[position].requires_grad for position in expression.positions)


def _decide_now(
    expression: WeightExpression, context: Context, rule: partial[Decision]
) -> Decision | Skip:
    """The decision from the real weight; from the configuration alone where there are no values."""
    if context.abstract:
        return Decision(None, "default policy: the values are not known while the graph is split")
    decision = rule(expression.evaluate([context.inputs[i] for i in expression.positions]), None)
    if decision.quantized is None:
        return Skip(decision.reason)
    return decision


def _planes(decision: Decision, context: Context) -> int:
    if decision.quantized is not None:
        return decision.quantized.planes
    return context.config.planes if isinstance(context.config.planes, int) else _DEFAULT_PLANES


def _rewrite_training(match: Match, context: Context, name: str, decision: Decision) -> None:
    """linear(x, W, b) -> linear(fake_quantize_act(x), fake_quantize(W), b), straight-through."""
    config, node = context.config, match.root
    planes = _planes(decision, context)
    ops = torch.ops.ternc

    def fake_quantised(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if config.op_activation_bits:
            x = ops.fake_quantize_act.default(x, config.op_activation_bits)
        return F.linear(x, ops.fake_quantize.default(weight, planes, config.fit_group), bias)

    new = inline(node, fake_quantised, match.parts["x"], match.parts["weight"], match.parts["bias"])
    _replace(node, new, LinearRule.name)
    weight = example_value(match.parts["weight"])
    row = _row(name, "linear (training)", weight, decision, context, planes)
    row.reason = (
        "gradients are enabled and the weight requires grad: fake-quantised, straight-through"
    )
    row.bytes_after = row.bytes_at_rest = row.bytes_before
    row.bits_per_weight = 8.0 * weight.element_size()
    context.rows.append(row)


def _rewrite_packed(
    match: Match, context: Context, name: str, decision: Decision, rule: partial[Decision]
) -> None:
    expression: WeightExpression = match.parts["expression"]
    weight = example_value(match.parts["weight"])
    planes = _planes(decision, context)
    row = _row(name, "linear", weight, decision, context, planes)
    site = WeightSite(
        name=name,
        inputs=expression.positions,
        key=expression.key,
        evaluate=expression.evaluate,
        decide=rule,
        planes=planes,
        variant=_variant(decision, weight, planes, context),
        device=weight.device.type,
        row=row,
        first=decision if decision.quantized is not None else None,
    )
    row.shared_with = next((s.name for s in context.sites if _same_weight(s, site)), None)
    context.sites.append(site)
    context.rows.append(row)
    _emit(match, context, site)


def _variant(decision: Decision, weight: torch.Tensor, planes: int, context: Context) -> Variant:
    layout = resident_layout(planes, weight.device.type)
    quantized = decision.quantized
    if quantized is not None:
        return Variant(
            layout,
            quantized.group_size,
            tuple(quantized.scale.shape),
            quantized.multiplier is not None,
        )
    group = context.config.fit_group
    if group >= weight.shape[1]:  # one group is a row
        group = 0
    return Variant(layout, max(group, 0), (1 if group < 0 else int(weight.shape[0]),), group > 0)


def _emit(match: Match, context: Context, site: WeightSite) -> None:
    node, variant = match.root, site.variant
    bits = context.config.op_activation_bits
    fields = ["weight", "scale"] + (["multiplier"] if variant.has_multiplier else [])
    example = site.empty_packed(example_value(match.parts["weight"]))
    packed = {
        field: _packed_input(node.graph, context, site, field, getattr(example, field))
        for field in fields
    }
    x, out = match.parts["x"], example_value(node)
    source = unquantized_source(x, bits) if bits and not context.abstract else None
    if source is not None:
        x, site.own_quantizer = source, True
        site.row.pattern = "activation quantiser + linear"
    if example_value(x).dtype != out.dtype:  # autocast chose another dtype for this linear
        x = inline(node, lambda value: value.to(out.dtype), x)
    with node.graph.inserting_before(node):
        new = node.graph.call_function(
            torch.ops.ternc.linear.default,
            (
                x,
                packed["weight"],
                packed["scale"],
                packed.get("multiplier"),
                match.parts["bias"],
                int(example_value(match.parts["weight"]).shape[0]),
                variant.group_size,
                bits,
                variant.layout,
            ),
        )
    new.meta["example_value"] = out
    new.meta["ternc_site"] = site
    _replace(node, new, LinearRule.name)


def _packed_input(
    graph: fx.Graph, context: Context, site: WeightSite, field: str, example: torch.Tensor
) -> fx.Node:
    """A new graph input for one tensor of a packed weight; a tied weight reuses the input it
    has.
    """
    for node in graph.find_nodes(op="placeholder"):
        known = node.meta.get("ternc_packed")
        if known and known[1] == field and _same_weight(known[0], site):
            return node
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"ternc_{field}_{len(context.packed_inputs)}")
    node.meta["ternc_packed"] = (site, field)
    node.meta["example_value"] = example
    context.packed_inputs.append((site, field))
    return node


def _same_weight(a: WeightSite, b: WeightSite) -> bool:
    return (a.inputs, a.key, a.variant) == (b.inputs, b.key, b.variant)


def _replace(node: fx.Node, new: fx.Node, rule: str) -> None:
    carry_provenance(node, new)
    new.meta["ternc_rule"] = rule
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _row(
    name: str, pattern: str, weight: torch.Tensor, decision: Decision, context: Context, planes: int
) -> Row:
    """Report row of a rewritten weight; sizes follow from the layout, before anything is packed."""
    quantized, bits = decision.quantized, context.config.activation_bits
    rows, columns = int(weight.shape[0]), int(weight.shape[1])
    variant = _variant(decision, weight, planes, context)
    nbytes = packed_bytes(rows, columns, variant)
    label = quantized.describe() if quantized is not None else f"ternary x{planes}"
    return Row(
        name=name,
        pattern=pattern,
        action="rewritten",
        reason=decision.reason,
        format=f"{label} a{bits}" if bits else f"{label} float activations",
        shape=(rows, columns),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=nbytes,
        bytes_at_rest=packed_bytes(
            rows, columns, dataclasses.replace(variant, layout=at_rest_layout(planes))
        ),
        bits_per_weight=8.0 * nbytes / max(1, rows * columns),
        weight_error=decision.error,
    )


def packed_bytes(rows: int, columns: int, variant: Variant) -> int:
    """Bytes of the tensors of a packed weight; a scale takes 2 bytes at rest where it was
    fitted.
    """
    layout = layouts.get(variant.layout)
    groups = group_count(columns, variant.group_size)
    multipliers = math.prod(layout.multiplier_shape(rows, groups)) if variant.has_multiplier else 0
    return layout.nbytes(rows, columns) + multipliers + 4 * math.prod(variant.scale_shape)
