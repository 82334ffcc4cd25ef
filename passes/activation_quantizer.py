"""linear(quantiser(x), W) -> ternc::linear(x, W): a model's own activation quantiser, found by its
values.

BitLinear modules round their activations in code of their own before the product. Where that code
computes what `ternc::linear` computes itself, it is a second pass over memory for nothing. No
spelling is matched: the nodes between x and the linear are run on random rows and compared with
`ternc::quantize_act`.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ternc.passes.graph import example_value, is_tensor

_MAX_NODES = 24
_MAX_ELEMENTS = 1 << 22
_AGREEMENT = 0.999
"""Share of integers that must be equal: the rule of the contract for two roundings of the same
quantity.
"""


def unquantized_source(x: fx.Node, bits: int) -> fx.Node | None:
    """The tensor of which `x` is the per-token `bits`-bit quantisation, or None."""
    region = _ancestors(x)
    if not any(_rounds(node) for node in region):
        return None
    for candidate in region[1:]:
        if not is_tensor(candidate) or not _same_shape(candidate, x):
            continue
        between = _between(candidate, x)
        if between is None or not any(_rounds(node) for node in between):
            continue
        if _quantizes(candidate, x, between, bits):
            return candidate
    return None


def _ancestors(x: fx.Node) -> list[fx.Node]:
    """x and what it depends on, nearest first, at most `_MAX_NODES`."""
    order, seen = [x], {x}
    for node in order:
        if len(order) >= _MAX_NODES:
            break
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                order.append(source)
    return order


def _rounds(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and "round" in name


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return example_value(a).shape == example_value(b).shape and example_value(a).is_floating_point()


def _between(source: fx.Node, x: fx.Node) -> set[fx.Node] | None:
    """Nodes that compute x from `source` alone; None if x depends on anything else."""
    found: set[fx.Node] = set()
    pending = [x]
    while pending:
        node = pending.pop()
        if node is source or node in found:
            continue
        if node.op not in ("call_function", "call_method") or len(found) > _MAX_NODES:
            return None
        found.add(node)
        pending.extend(node.all_input_nodes)
    return found


def _quantizes(source: fx.Node, x: fx.Node, between: set[fx.Node], bits: int) -> bool:
    example = example_value(source)
    shape = [int(size) for size in example.shape]
    if math.prod(shape) > _MAX_ELEMENTS or 0 in shape:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator)
    rows *= torch.randn([*shape[:-1], 1], generator=generator).exp()
    given = rows.to(device=example.device, dtype=example.dtype)
    try:
        with torch.no_grad():
            computed = _subgraph(source, x, between)(given.clone()).float()
    except (RuntimeError, TypeError, ValueError):
        return False
    q, scale = torch.ops.ternc.quantize_act(given, bits)
    steps = computed / scale
    near = torch.finfo(example_value(x).dtype).eps * 2 * steps.abs().clamp(min=1.0)
    agree = ((steps - q).abs() <= near).float().mean().item()
    return agree >= _AGREEMENT and (steps - q).abs().max().item() <= 1.01


def _subgraph(source: fx.Node, x: fx.Node, between: set[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    mapping = {source: graph.placeholder("x")}
    for node in source.graph.nodes:
        if node in between:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(mapping[x])
    owner = source.graph.owning_module
    assert owner is not None
    return fx.GraphModule(owner, graph)
