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
from ternc.passes.region import ancestors, between, evaluate

_MAX_ELEMENTS = 1 << 22
_ROWS = 5
_AGREEMENT = 0.999
"""Share of integers that must be equal: the rule of the contract for two roundings of the same
quantity.
"""


def unquantized_source(x: fx.Node, bits: int) -> fx.Node | None:
    """The tensor of which `x` is the per-token `bits`-bit quantisation, or None."""
    nodes = ancestors(x)
    if not any(_rounds(node) for node in nodes):
        return None
    for candidate in nodes[1:]:
        if not is_tensor(candidate) or not _same_shape(candidate, x):
            continue
        region = between(candidate, x)
        if region is None or not any(_rounds(node) for node in region):
            continue
        if _quantizes(candidate, x, region, bits):
            return candidate
    return None


def _rounds(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and "round" in name


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return example_value(a).shape == example_value(b).shape and example_value(a).is_floating_point()


def _quantizes(source: fx.Node, x: fx.Node, region: set[fx.Node], bits: int) -> bool:
    example = example_value(source)
    if not isinstance(example.shape[-1], int):
        return False
    # Any number will do for a size that varies; asking for its value would fix it with a guard.
    shape = [size if isinstance(size, int) else _ROWS for size in example.shape]
    if math.prod(shape) > _MAX_ELEMENTS or 0 in shape:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator)
    rows *= torch.randn([*shape[:-1], 1], generator=generator).exp()
    given = rows.to(device=example.device, dtype=example.dtype)
    computed = evaluate(source, x, region, given)
    if computed is None:
        return False
    q, scale = torch.ops.ternc.quantize_act(given, bits)
    steps = computed.float() / scale
    near = torch.finfo(example_value(x).dtype).eps * 2 * steps.abs().clamp(min=1.0)
    agree = ((steps - q).abs() <= near).float().mean().item()
    return agree >= _AGREEMENT and (steps - q).abs().max().item() <= 1.01
