"""scaled_dot_product_attention(q, k, v, mask) -> ternc::attention on the CPU, fp32: of few queries
with a mask that shows keys or without one, of many without one, or with the causal one, of which
the hidden half is not computed. Keys that were repeated for heads that share them are read as they
are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.causal_mask import is_causal_mask
from ternc.passes.context import Context
from ternc.passes.graph import argument, example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.mutation import name_of, written_between
from ternc.passes.rule import Match, Skip

MANY = 64
"""Queries and keys from which on it is faster: queries lie in lanes, 32 at a time."""
FEW = 4
"""Queries up to which it is faster: two at a time read the keys, columns in lanes."""


class AttentionRule:
    """Runs behind the report, which says where attention stands and not what computes it."""

    name = "scaled_dot_product_attention(q, k, v) -> ternc::attention(q, k, v)"

    def match(self, node: fx.Node) -> Match | None:
        if node.target is not F.scaled_dot_product_attention:
            return None
        names = ("query", "key", "value")
        q, k, v = (argument(node, i, name) for i, name in enumerate(names))
        return Match(node, {"q": q, "k": k, "v": v})

    def check(self, match: Match, context: Context) -> Skip | None:
        node = match.root
        if context.grad_enabled:
            return Skip("gradients are enabled", node)
        if argument(node, 4, "dropout_p", 0.0):
            return Skip("attention has dropout", node)
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if not isinstance(causal, bool) or (causal and mask is not None):
            return Skip("whether attention is causal is known when it runs", node)
        if not isinstance(argument(node, 6, "scale"), float | int | None):
            return Skip("the scale of attention is known when it runs", node)
        q, k, v = (example_value(match.parts[name]) for name in ("q", "k", "v"))
        if not _takes(q, k, v, example_value(node)):
            return Skip("attention is not fp32 on the CPU, [B, heads, L, D]", node)
        if q.shape[2] <= FEW:
            return _why_not_shown(mask, node)
        if min(q.shape[2], k.shape[2]) < MANY:
            return Skip(f"attention is of more than {FEW} and less than {MANY} tokens", node)
        size = (q.shape[2], k.shape[2])
        if mask is not None and not is_causal_mask(mask, size, context.tainted):
            return Skip("attention has a mask that is not the causal one, or not constant", node)
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        node = match.root
        q, k, v = (match.parts[name] for name in ("q", "k", "v"))
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(example_value(q).shape[3]) if scale is None else float(scale)
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if example_value(q).shape[2] > FEW:
            mask, causal = None, causal or mask is not None
        k, v = _unrepeated(k, v, node)
        attended = inline(node, torch.ops.ternc.attention.default, q, k, v, scale, causal, mask)
        attended.meta["ternc_rule"] = self.name
        node.replace_all_uses_with(attended)
        node.graph.erase_node(node)


def _why_not_shown(mask: Any, node: fx.Node) -> Skip | None:
    """A refusal where a mask is no tensor that shows keys."""
    if mask is None:
        return None
    if not is_tensor(mask) or example_value(mask).dtype != torch.bool:
        return Skip("attention has a mask that is added", node)
    dims = example_value(mask).dim()
    return None if 2 <= dims <= 4 else Skip(f"attention has a mask of {dims} dimensions", node)


def _takes(q: Any, k: Any, v: Any, y: Any) -> bool:
    """Whether q, k, v and the result are what the kernel takes."""
    for t in (q, k, v, y):
        if t.device.type != "cpu" or t.dtype != torch.float32 or t.dim() != 4:
            return False
        if not all(isinstance(size, int) for size in t.shape):
            return False
        if t.numel() == 0:
            return False
    alike = q.shape[0] == k.shape[0] and k.shape[:2] == v.shape[:2]  # none is broadcast
    return bool(alike and q.shape[1] % k.shape[1] == 0 and y.shape[:2] == q.shape[:2])


def _unrepeated(k: fx.Node, v: fx.Node, user: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The keys and values that were repeated for heads that share them; as given if they were not,
    or if they are written to before `user` reads them.
    """
    bare_k, bare_v = _before_repeat(k), _before_repeat(v)
    if bare_k is None or bare_v is None:
        return k, v
    if written_between(bare_k, k, user) or written_between(bare_v, v, user):
        return k, v
    if example_value(bare_k).shape[1] != example_value(bare_v).shape[1]:
        return k, v
    return bare_k, bare_v


def _before_repeat(repeated: fx.Node) -> fx.Node | None:
    """x of reshape(expand(x[:, :, None])), [B, G, S, D] -> [B, G, n, S, D] -> [B, G n, S, D]."""
    views: list[Any] = [repeated]
    for names in (("reshape",), ("expand",), ("getitem", "unsqueeze")):
        if name_of(views[-1]) not in names or not is_tensor(views[-1].args[0]):
            return None
        views.append(views[-1].args[0])
    merged, spread, single, source = (tuple(example_value(view).shape) for view in views)
    if len(source) != 4 or len(spread) != 5 or not _only_slices(views[2]):
        return None
    batch, groups, keys, columns = source
    times = spread[2]
    wanted = (
        (batch, groups * times, keys, columns),
        (batch, groups, times, keys, columns),
        (batch, groups, 1, keys, columns),
    )
    return views[3] if (merged, spread, single) == wanted else None


def _only_slices(node: fx.Node) -> bool:
    """Whether an index moves no element: where the size stays, slices and new axes do not."""
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice | int | None) for part in parts)
