"""A weight in training -> fake-quantised on a schedule, straight through, and named.

    linear(x, W) -> linear(blend_quantize_act(x, state_x), blend_quantize(W, state_w))

The states are inputs of the graph (`runtime/states.py` holds them): moving a schedule compiles
nothing.
"""

from __future__ import annotations

import torch
from torch import fx

from ternc.formats.blend import ACTIVATION_BITS, WEIGHT_BITS
from ternc.passes.context import Context
from ternc.passes.graph import example_value
from ternc.passes.inline import inline
from ternc.passes.rule import Skip
from ternc.passes.weight_expression import WeightExpression
from ternc.passes.weight_site import describe_training_row, fit_group, planes_of
from ternc.site import Decision, TrainedWeight


def why_not_train(expression: WeightExpression) -> Skip | None:
    """A refusal for a weight whose own quantiser or reparametrisation is what is trained."""
    if expression.is_rearrangement:
        return None
    return Skip("in training the model's own weight quantiser or reparametrisation is kept")


def fake_quantised(
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    name: str,
    pattern: str,
    expression: WeightExpression,
    decision: Decision,
    context: Context,
) -> tuple[fx.Node, fx.Node]:
    """x and weight [N, K] as a product in training reads them; registers site and row.

    Args:
        node: the product, before which the new nodes are written.
    """
    example, config = example_value(weight), context.config
    trained = TrainedWeight(
        name=name,
        position=expression.positions[0],
        key=expression.key,
        evaluate=expression.evaluate,
        planes=planes_of(decision, context),
        group_size=fit_group(config, example),
        activation_bits=config.op_activation_bits,
    )
    ops = torch.ops.ternc
    if trained.activation_bits:
        state = _state_input(node.graph, trained, "activation", example)
        x = inline(node, ops.blend_quantize_act.default, x, state, ACTIVATION_BITS)
    state = _state_input(node.graph, trained, "weight", example)
    numbers = (trained.planes, trained.group_size)
    weight = inline(node, ops.blend_quantize.default, weight, state, WEIGHT_BITS, *numbers)
    context.trained.append(trained)
    context.rows.append(describe_training_row(name, pattern, example, decision, context))
    return x, weight


def _state_input(
    graph: fx.Graph, trained: TrainedWeight, field: str, like: torch.Tensor
) -> fx.Node:
    """A new graph input for one state; a weight that several products read has one of each."""
    for node in graph.find_nodes(op="placeholder"):
        known = node.meta.get("ternc_state")
        same = known and (known[0].position, known[0].key, known[1])
        if same == (trained.position, trained.key, field):
            return node
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"ternc_{field}_state_{len(graph.find_nodes(op='placeholder'))}")
    node.meta["ternc_state"] = (trained, field)
    node.meta["example_value"] = like.new_empty(
        3, dtype=torch.float32, device="cpu", requires_grad=False
    )
    return node
