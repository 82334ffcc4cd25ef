"""Is the mask of attention the causal one? Known where the graph computes it from no input."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ternc.passes.graph import example_value
from ternc.passes.mutation import is_random

_MAX_ELEMENTS = 1 << 26
"""Of a mask that is computed to look at it."""


def is_causal_mask(mask: Any, size: tuple[int, int], tainted: Collection[fx.Node]) -> bool:
    """Whether a mask [..., L, S] is constant and shows query i exactly the keys 0 to i.

    Boolean: True shows a key. Floating point: 0 shows it; minus infinity, or the least number of
    the dtype, hides it.

    Args:
        size: (L, S); a mask that is broadcast to it says the same of every query, or every key.
        tainted: nodes that the graph writes in place; a mask made from one is not constant.
    """
    if not isinstance(mask, fx.Node):
        return False
    steps = _steps_of(mask)
    sizes = example_value(mask).shape
    if steps is None or any(step in tainted for step in steps):
        return False
    if not all(isinstance(n, int) for n in sizes) or tuple(sizes[-2:]) != size:
        return False
    if sizes.numel() > _MAX_ELEMENTS:
        return False
    try:
        with unset_fake_temporarily(), torch.no_grad():
            return _shows_the_past(_evaluate(steps))
    except Exception:  # of many kinds: a step may need what stands around it, as under vmap
        return False


def _steps_of(mask: fx.Node) -> list[fx.Node] | None:
    """The calls that make a node, in order; None where they read an input, are random, or are not
    torch's own: those may read what no node tells of.
    """
    found: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if not _is_torch(node) or is_random(node):
            return None
        found.add(node)
        pending.extend(node.all_input_nodes)
    return sorted(found)


def _is_torch(node: fx.Node) -> bool:
    """Whether a node calls a function or a method of torch, or an operator of Python."""
    if node.op == "call_method":
        return True
    if node.op != "call_function" or getattr(node.target, "namespace", "aten") != "aten":
        return False
    module = getattr(node.target, "__module__", None) or "torch"
    return module.partition(".")[0] in ("torch", "_operator", "builtins")


def _evaluate(steps: list[fx.Node]) -> Any:
    values: dict[fx.Node, Any] = {}
    for node in steps:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    return values[steps[-1]]


def _shows_the_past(mask: torch.Tensor) -> bool:
    shown = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == shown).all())
    hides = (mask == float("-inf")) | (mask == torch.finfo(mask.dtype).min)
    return bool(torch.where(shown, mask == 0, hides).all())
