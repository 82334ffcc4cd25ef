"""Removes what stands between a norm, an activation and the linears that read them.

dropout(x, training=False) -> x;  x.to(its own dtype) -> x;  contiguous of the contiguous -> x;
linear(x.view(-1, K)) -> linear(x).view(-1, N);  x.view(a).view(b) -> x where b is the shape of x;
ternc::linear(x) under autocast -> ternc::linear(x.to(dtype)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.casts import cast_before
from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.inline import inline

_CASTS = {"to", "float", "half", "bfloat16", "type_as", "type"}
_PACKED = ("ternc.linear", "ternc.linear.default")
_VIEWS = {"view", "reshape", torch.reshape}


def simplify(gm: fx.GraphModule) -> None:
    """Rewrites in place until nothing changes; the values of the graph's outputs stay the same."""
    for node in list(gm.graph.nodes):
        if _is_linear(node):
            _hoist_view(node)
        if str(node.target) in _PACKED:
            _cast_before(node)
    for node in list(gm.graph.nodes):
        source = _same_value(node)
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def _cast_before(node: fx.Node) -> None:
    """Autocast gives a packed linear another dtype than its input: the cast becomes a node."""
    x, dtype = arguments(node)[0], example_value(node).dtype
    if example_value(x).dtype != dtype:
        node.update_arg(0, cast_before(node, x, dtype))


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.linear


def _same_value(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` returns unchanged, or None."""
    if node.op not in ("call_function", "call_method") or not arguments(node):
        return None
    x = arguments(node)[0]
    if not is_tensor(x) or not is_tensor(node):
        return None
    if node.target is F.dropout:
        return None if argument(node, 2, "training", True) else x
    if node.target in _CASTS:
        return x if _cast_does_nothing(node, x) else None
    if node.target == "contiguous" and len(arguments(node)) == 1 and not node.kwargs:
        return x if _is_contiguous(x) else None
    if node.target in _VIEWS:
        return _unviewed(node)
    return None


def _cast_does_nothing(node: fx.Node, x: fx.Node) -> bool:
    before, after = example_value(x), example_value(node)
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and not node.kwargs.get("copy", False)
        and "memory_format" not in node.kwargs
    )


def _is_contiguous(x: fx.Node) -> bool:
    """Whether strides are those of a fresh tensor, for static sizes only: no guard is added."""
    value = example_value(x)
    if any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride())):
        return False
    return value.is_contiguous()


def _unviewed(node: fx.Node) -> fx.Node | None:
    """x for x.view(a).view(b) where b spells the shape of x."""
    inner = arguments(node)[0]
    assert isinstance(inner, fx.Node)
    if inner.target not in _VIEWS or not is_tensor(arguments(inner)[0]):
        return None
    x = arguments(inner)[0]
    assert isinstance(x, fx.Node)
    same = str(tuple(example_value(x).shape)) == str(tuple(example_value(node).shape))
    return x if same else None


def _hoist_view(node: fx.Node) -> None:
    """linear(x.view(..., K), W, b) -> linear(x, W, b).view(..., N)."""
    viewed = arguments(node)[0]
    if not isinstance(viewed, fx.Node) or viewed.target not in _VIEWS:
        return
    x = arguments(viewed)[0]
    width = example_value(viewed).shape[-1]
    if not is_tensor(x) or example_value(x).dim() < 2 or not _same_size(x, width):
        return
    sizes = _sizes(viewed)
    if not sizes:
        return
    out = int(example_value(node).shape[-1])
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    flat = inline(node, F.linear, x, weight, bias)
    new = inline(node, lambda y, *lead: y.reshape(*lead, out), flat, *sizes[:-1])
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _same_size(x: fx.Node, width: Any) -> bool:
    last = example_value(x).shape[-1]
    return isinstance(width, int) and isinstance(last, int) and last == width


def _sizes(view: fx.Node) -> list[Any]:
    """Sizes of a view as they were written: numbers, -1, nodes."""
    sizes = arguments(view)[1] if len(arguments(view)) == 2 else arguments(view)[1:]
    if isinstance(sizes, (tuple, list)):
        return list(sizes)
    return [sizes]
