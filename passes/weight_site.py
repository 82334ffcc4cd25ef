"""From a weight in the graph to its site: the decision, the row, the packed inputs of the graph.

What every rule that packs a weight does the same way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import fx

from ternc.config import Config
from ternc.decision import decide_int8, decide_rotated
from ternc.formats import layouts
from ternc.formats.layouts import at_rest_layout, resident_layout
from ternc.formats.packed import tied_codes
from ternc.formats.quantized import group_count
from ternc.formats.rotation import Rotation, SharedSigns
from ternc.passes.context import Context
from ternc.passes.graph import example_value
from ternc.passes.inline import carry_provenance, inline
from ternc.passes.rule import Skip
from ternc.passes.weight_expression import WeightExpression
from ternc.reporting import Row
from ternc.site import Decision, Variant, WeightSite

_DEFAULT_PLANES = 3

Evaluate = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def requires_grad(expression: WeightExpression, context: Context) -> bool:
    """Whether any tensor that the weight is computed from requires grad."""
    return any(context.inputs[position].requires_grad for position in expression.positions)


def decide_now(
    evaluate: Evaluate,
    positions: Sequence[int],
    context: Context,
    int8: bool = False,
    rotation: Rotation | None = None,
) -> Decision | Skip:
    """The decision from the real weight; from the configuration alone where there are no values.

    Args:
        rotation: of the inputs, where the configuration asks for one and the product can have it.
    """
    if context.abstract and int8:
        return Skip("int8 is not decided on while the graph is split: the values are not known")
    if context.abstract:
        return Decision(None, "default policy: the values are not known while the graph is split")
    weight = evaluate([context.inputs[position] for position in positions])
    if weight.is_meta:
        return Skip("the weight is on the meta device, without values")
    decision = (
        decide_int8(weight) if int8 else decide_rotated(weight, None, context.config, rotation)
    )
    return Skip(decision.reason) if decision.quantized is None else decision


def planes_of(decision: Decision, context: Context) -> int:
    """Plane count of a decision; the default policy's where there are no values."""
    if decision.quantized is not None:
        return decision.quantized.planes
    return context.config.planes if isinstance(context.config.planes, int) else _DEFAULT_PLANES


def add_site(
    name: str,
    pattern: str,
    weight: torch.Tensor,
    expression: WeightExpression,
    evaluate: Evaluate,
    decision: Decision,
    context: Context,
    int8: bool = False,
    stacked: bool = False,
) -> WeightSite:
    """Registers the site and the row of a weight [N, K] that is going to be packed.

    Args:
        weight: example value whose shape, dtype and device are those of the weight.
        evaluate: tensors at `expression.positions` -> weight [N, K].
        stacked: it is several weights, one below the other.
    """
    planes, config = planes_of(decision, context), context.config
    row = describe_row(name, pattern, weight, decision, context, stacked)
    again = partial(decide_rotated, config=config, rotation=decision.rotation)
    site = WeightSite(
        name=name,
        inputs=expression.positions,
        key=f"{expression.key}|{'int8' if int8 else _policy(config, decision)}",
        evaluate=evaluate,
        decide=decide_int8 if int8 else again,
        planes=planes,
        variant=_variant(decision, weight, planes, context, stacked),
        stacked=stacked,
        device=weight.device.type,
        shape=(int(weight.shape[0]), int(weight.shape[1])),
        row=row,
        rotation=decision.rotation,
        first=decision if decision.quantized is not None else None,
    )
    row.shared_with = next((s.name for s in context.sites if _same_weight(s, site)), None)
    context.sites.append(site)
    context.rows.append(row)
    return site


def _policy(config: Config, decision: Decision) -> str:
    """The settings that decide what a weight becomes: packed under others it is another weight."""
    return f"{config.planes},{config.error_budget},{config.group_size},{decision.rotation}"


def packed_inputs(
    graph: fx.Graph, context: Context, site: WeightSite, like: torch.Tensor
) -> dict[str, fx.Node]:
    """Graph inputs `weight`, `scale` and, where there is one, `multiplier` of a site."""
    fields = ["weight", "scale"] + (["multiplier"] if site.variant.has_multiplier else [])
    example = site.empty_packed(like)
    return {
        field: _packed_input(graph, context, site, field, getattr(example, field))
        for field in fields
    }


def rotated(at: fx.Node, x: fx.Node, rotation: Rotation) -> fx.Node:
    """hadamard(x, signs, b) before a node, its signs an input of the graph, one for all."""
    value = example_value(x)
    source = (SharedSigns(rotation, int(value.shape[-1]), str(value.device)), "signs")
    found = at.graph.find_nodes(op="placeholder")
    signs = next((node for node in found if node.meta.get("ternc_packed") == source), None)
    if signs is None:
        with at.graph.inserting_after(found[-1]):
            signs = at.graph.placeholder(f"ternc_signs_{len(found)}")
        signs.meta["ternc_packed"] = source
        signs.meta["example_value"] = value.new_empty((value.shape[-1],), dtype=torch.int8)
    return inline(at, torch.ops.ternc.hadamard.default, x, signs, rotation.block)


def replace(node: fx.Node, new: fx.Node, rule: str) -> None:
    """`new` takes the place of `node` and says which rule made it."""
    carry_provenance(node, new)
    new.meta["ternc_rule"] = rule
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def fit_group(config: Config, weight: torch.Tensor) -> int:
    """Group argument of `ternc::fit` for a weight [N, K]: one group a row is a row scale."""
    return config.fit_group if config.fit_group < weight.shape[1] else 0


def describe_row(
    name: str,
    pattern: str,
    weight: torch.Tensor,
    decision: Decision,
    context: Context,
    stacked: bool = False,
) -> Row:
    """Report row of a rewritten weight; sizes follow from the layout, before anything is packed."""
    planes = planes_of(decision, context)
    quantized, bits = decision.quantized, context.config.activation_bits
    rows, columns = int(weight.shape[0]), int(weight.shape[1])
    variant = _variant(decision, weight, planes, context, stacked)
    nbytes = packed_bytes(rows, columns, variant)
    label = quantized.describe() if quantized is not None else f"ternary x{planes}"
    turned = " rotated" if decision.rotation is not None else ""
    return Row(
        name=name,
        pattern=pattern,
        action="rewritten",
        reason=decision.reason + ("; input rotated online" if turned else ""),
        format=(f"{label} a{bits}" if bits else f"{label} float activations") + turned,
        shape=(rows, columns),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=nbytes,
        bytes_at_rest=packed_bytes(
            rows, columns, dataclasses.replace(variant, layout=at_rest_layout(planes))
        ),
        bits_per_weight=8.0 * nbytes / max(1, rows * columns),
        weight_error=decision.error,
    )


def describe_training_row(
    name: str, pattern: str, weight: torch.Tensor, decision: Decision, context: Context
) -> Row:
    """Report row of a weight that is trained: it is rewritten, and stays in floating point."""
    row = describe_row(name, pattern, weight, decision, context)
    row.reason = (
        "gradients are enabled and the weight requires grad: fake-quantised, straight-through"
    )
    row.bytes_after = row.bytes_at_rest = row.bytes_before
    row.bits_per_weight = 8.0 * weight.element_size()
    return row


def packed_bytes(rows: int, columns: int, variant: Variant) -> int:
    """Bytes of the tensors of a packed weight; a scale takes 2 bytes at rest where it was
    fitted.
    """
    layout = layouts.get(variant.layout)
    groups = group_count(columns, variant.group_size)
    multipliers = math.prod(layout.multiplier_shape(rows, groups)) if variant.has_multiplier else 0
    return layout.nbytes(rows, columns) + multipliers + 4 * math.prod(variant.scale_shape)


def _variant(
    decision: Decision, weight: torch.Tensor, planes: int, context: Context, stacked: bool
) -> Variant:
    quantized, shape = decision.quantized, (int(weight.shape[0]), int(weight.shape[1]))
    # A fitted scale is tied.
    codes = math.prod(shape) if quantized is None else tied_codes(quantized.scale, shape)
    layout = resident_layout(planes, weight.device.type, 0 if stacked else codes)
    if quantized is not None:
        return Variant(
            layout,
            quantized.group_size,
            tuple(quantized.scale.shape),
            quantized.multiplier is not None,
            decision.rotation is not None,
        )
    group = fit_group(context.config, weight)
    return Variant(layout, max(group, 0), (1 if group < 0 else int(weight.shape[0]),), group > 0)


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
