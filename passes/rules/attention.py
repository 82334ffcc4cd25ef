"""scaled_dot_product_attention(q, k, v) -> ternc::attention(q, k, v) on the CPU: many fp32 tokens
without a mask, or with the causal one, of which the hidden half is not computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.causal_mask import is_causal_mask
from ternc.passes.context import Context
from ternc.passes.graph import argument, example_value
from ternc.passes.inline import inline
from ternc.passes.rule import Match, Skip

MIN_TOKENS = 64
"""Queries and keys from which on it is faster: queries lie in lanes, 32 at a time."""


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
            return Skip("attention is not of many fp32 tokens on the CPU, [B, heads, L, D]", node)
        size = (q.shape[2], k.shape[2])
        if mask is not None and not is_causal_mask(mask, size, context.tainted):
            return Skip("attention has a mask that is not the causal one, or not constant", node)
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        node = match.root
        q, k, v = (match.parts[name] for name in ("q", "k", "v"))
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(example_value(q).shape[3]) if scale is None else float(scale)
        causal = argument(node, 5, "is_causal", False) or argument(node, 3, "attn_mask") is not None
        attended = inline(node, torch.ops.ternc.attention.default, q, k, v, scale, causal)
        attended.meta["ternc_rule"] = self.name
        node.replace_all_uses_with(attended)
        node.graph.erase_node(node)


def _takes(q: Any, k: Any, v: Any, y: Any) -> bool:
    """Whether q, k, v and the result are what the kernel takes."""
    for t in (q, k, v, y):
        if t.device.type != "cpu" or t.dtype != torch.float32 or t.dim() != 4:
            return False
        if not all(isinstance(size, int) for size in t.shape):
            return False
        if t.numel() == 0 or t.shape[2] < MIN_TOKENS:
            return False
    alike = q.shape[0] == k.shape[0] and k.shape[:2] == v.shape[:2]  # none is broadcast
    return bool(alike and q.shape[1] % k.shape[1] == 0 and y.shape[:2] == q.shape[:2])
