"""The ordered list of passes: normal forms first, then rules. Order is meaning, so it stands here
and nowhere else.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from ternc.formats import layouts
from ternc.formats.quantized import kind
from ternc.passes.attention_fast_paths import decompose_attention
from ternc.passes.attention_regions import report_regions
from ternc.passes.bodies import inline_bodies, own_bodies, pass_packed
from ternc.passes.context import Context, weight_name
from ternc.passes.describe import describe_graph
from ternc.passes.folds.fold import Fold, FoldFinder
from ternc.passes.folds.residual_stream import ResidualStreamFold
from ternc.passes.folds.value_heads import ValueHeadsFold
from ternc.passes.graph import (
    arguments,
    calling_module,
    dotted_path,
    example_value,
    is_static_input,
    mark_inputs,
    source_of,
)
from ternc.passes.hand_written_attention import fuse_attention
from ternc.passes.int8_weights import mark_int8
from ternc.passes.mutation import drop_unused, name_of, tainted, without_needless_writes
from ternc.passes.rotated_input import read_rotation
from ternc.passes.rule import Rule, Skip
from ternc.passes.rules.activation import ActivationRule
from ternc.passes.rules.attention import AttentionRule
from ternc.passes.rules.embedding import EmbeddingRule
from ternc.passes.rules.experts import ExpertsRule
from ternc.passes.rules.gather import GatherRule
from ternc.passes.rules.linear import LinearRule
from ternc.passes.rules.norm import NormRule
from ternc.passes.rules.residual import ResidualRule
from ternc.passes.rules.rotation import RotationRule
from ternc.passes.rules.shared_input import SharedInputRule
from ternc.passes.rules.shared_rotation import SharedRotationRule
from ternc.passes.rules.token import TokenActivationRule, TokenNormRule
from ternc.passes.rules.trigonometry import TrigonometryRule
from ternc.passes.simplify import simplify
from ternc.passes.spellings import spell_linears
from ternc.passes.ternary_call import read
from ternc.passes.trace import trace
from ternc.passes.verify import verify
from ternc.passes.weight_expression import WeightExpression
from ternc.passes.weight_site import packed_bytes
from ternc.reporting import Row
from ternc.site import Variant

RULES: tuple[Rule, ...] = (
    EmbeddingRule(),
    LinearRule(),
    ExpertsRule(),
    SharedRotationRule(),
    SharedInputRule(),
    GatherRule(),
    NormRule(),
    ActivationRule(),
    RotationRule(),
    ResidualRule(),
)

LATE_RULES: tuple[Rule, ...] = (
    TokenNormRule(),
    TokenActivationRule(),
    AttentionRule(),
    TrigonometryRule(),
)
"""Behind the report: they change nothing that it says."""

FOLDS: tuple[FoldFinder, ...] = (
    ValueHeadsFold(),
    ResidualStreamFold(),
)


def run(gm: fx.GraphModule, context: Context) -> fx.GraphModule:
    """Rewrites `gm` in place; sites, rows and new inputs are left in `context`."""
    mark_inputs(gm, context.inputs)
    context.nodes_before = describe_graph(gm.graph)
    if not context.grad_enabled:
        inline_bodies(gm)
        verify(gm, "inline_bodies")
    _rewrite(gm, context)
    for call, body in own_bodies(gm, context.tainted):
        _rewrite(body, context)
        pass_packed(gm, call, body)
        verify(gm, "pass_packed")
    gm.recompile()
    return gm


def find_folds(gm: fx.GraphModule, context: Context) -> list[Fold]:
    """Every offline fold that the graph shows, refused ones included; `gm` is brought to normal
    form.
    """
    mark_inputs(gm, context.inputs)
    inline_bodies(gm)
    _normalise(gm, context)
    return [fold for finder in FOLDS for fold in finder.find(gm, context)]


def _rewrite(gm: fx.GraphModule, context: Context) -> None:
    """Normal forms, then rules, on one graph: that of the model or the body of a checkpoint."""
    unfused = _normalise(gm, context)
    mark_int8(gm, context)
    _apply_all(RULES, gm, context)
    _trace_unfused(gm)
    report_regions(gm, context, unfused)
    _apply_all(LATE_RULES, gm, context)


def _apply_all(rules: tuple[Rule, ...], gm: fx.GraphModule, context: Context) -> None:
    for rule in rules:
        apply(rule, gm, context)
        drop_unused(gm)
        verify(gm, rule.name)


def _normalise(gm: fx.GraphModule, context: Context) -> dict[fx.Node, str]:
    """Brings a graph to normal form; returns the attentions left as written, and why."""
    for skip in decompose_attention(gm):
        context.skip(str(skip.node), "attention", skip, None)
    verify(gm, "decompose_attention")
    spell_linears(gm)
    verify(gm, "spell_linears")
    without_needless_writes(gm)
    simplify(gm)
    verify(gm, "simplify")
    context.tainted |= tainted(gm)
    _find_packed_modules(gm, context)
    unfused = {skip.node: skip.reason for skip in fuse_attention(gm) if skip.node is not None}
    verify(gm, "fuse_attention")
    return unfused


def apply(rule: Rule, gm: fx.GraphModule, context: Context) -> None:
    """One sweep of one rule; a refusal becomes a report row where the rule looks at a weight."""
    for node in list(gm.graph.nodes):
        if node._erased or (match := rule.match(node)) is None:
            continue
        skip = rule.check(match, context) or rule.rewrite(match, context)
        trace(rule.name, node, skip)
        if isinstance(skip, Skip) and "weight" in match.parts:
            _record_skip(node, match.parts["weight"], match.parts["expression"], skip, context)


def _trace_unfused(gm: fx.GraphModule) -> None:
    """Says of every product that quantises its input itself what no fused op computes."""
    for node in gm.graph.nodes:
        call = read(node)
        if call is not None and call.pristine:
            made = call.x.op in ("call_function", "call_method")
            source = repr(name_of(call.x)) if made else "outside the graph"
            why = f"the input comes from {source}: no norm, activation or rotation that is read"
            rule = "linears(f(x), W) -> linears(quantise f(x) in one op, W)"
            trace(rule, node, Skip(why, call.x))


def _record_skip(
    node: fx.Node,
    weight: fx.Node,
    expression: WeightExpression | Skip,
    skip: Skip,
    context: Context,
) -> None:
    inputs = [] if isinstance(expression, Skip) else expression.inputs
    name = weight_name(node, weight, inputs)
    context.skip(context.unique_name(name), "linear", skip, example_value(weight))


def _find_packed_modules(gm: fx.GraphModule, context: Context) -> None:
    """Rows for `ternc::linear` and `ternc::embedding` nodes that were in the graph already: modules
    packed by `quantize`.
    """
    ops = torch.ops.ternc
    first_row: dict[fx.Node, Row] = {}
    for node in gm.graph.nodes:
        embeds = node.target in (ops.embedding, ops.embedding.default)
        if not embeds and node.target not in (ops.linear, ops.linear.default):
            continue
        weight = node.args[1]
        if "ternc_site" in node.meta or not is_static_input(weight):
            continue
        name = dotted_path(source_of(weight)).rpartition(".")[0]
        first = first_row.get(weight)
        row = _packed_row(node, name if first is None else calling_module(node) or name, embeds)
        row.name = context.unique_name(row.name)
        row.shared_with = None if first is None else first.name
        first_row.setdefault(weight, row)
        node.meta["ternc_row"] = row
        context.rows.append(row)
        context.row_positions.append((row, weight.meta["ternc_position"]))


def _packed_row(node: fx.Node, name: str, embeds: bool) -> Row:
    """Row of a `ternc::linear` or `ternc::embedding` whose weight is a buffer of the model."""
    given = arguments(node)
    rows, columns = given[4:6] if embeds else (given[5], example_value(given[0]).shape[-1])
    rotated = "" if embeds or not read_rotation(given[0]).block else " rotated"
    scale, multiplier = tuple(example_value(given[2]).shape), given[3]
    bits, number = (None, given[7]) if embeds else given[7:9]
    variant = Variant(number, given[6], scale, multiplier is not None)
    planes = layouts.get(number).planes
    at_rest = dataclasses.replace(variant, layout=layouts.at_rest_layout(planes))
    rows, columns = int(rows), int(columns)
    nbytes = packed_bytes(rows, columns, variant)
    unit = f"g{given[6]}" if given[6] else "row" if scale[0] == rows else "tensor"
    activations = "" if embeds else f" a{bits}" if bits else " float activations"
    return Row(
        name=name,
        pattern=f"packed {'embedding' if embeds else 'linear'}",
        action="rewritten",
        reason="packed before compilation; its buffers are the weights",
        format=f"{kind(planes)} {unit}{activations}{rotated}",
        shape=(rows, columns),
        bytes_before=rows * columns * example_value(node).element_size(),
        bytes_after=nbytes,
        bytes_at_rest=packed_bytes(rows, columns, at_rest),
        bits_per_weight=8.0 * nbytes / max(1, rows * columns),
    )
