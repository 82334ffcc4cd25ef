"""softmax(q k^T * scale + mask) v, as people write it -> scaled dot product attention.

Runs before the rules: what it leaves is what torch's fused attention kernels take.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.graph import argument, arguments, example_value, is_call, is_tensor
from ternc.passes.inline import inline
from ternc.passes.mutation import drop_unused, name_of
from ternc.passes.region import ancestors, steps, written_outside
from ternc.passes.rule import Skip
from ternc.passes.trace import trace

_MATMUL = {torch.matmul, torch.bmm, operator.matmul, torch.Tensor.matmul, "matmul", "bmm"}
_SOFTMAX = {F.softmax, torch.softmax, "softmax"}
_TRANSPOSE = {"transpose", torch.transpose, "swapaxes", torch.swapaxes}
_MASKED_FILL = {"masked_fill", torch.masked_fill}
_BADDBMM = {"baddbmm", torch.baddbmm}
_VIEWS = {"view", "reshape", torch.reshape}
_HIDING_STEPS = 6
"""Calls between a softmax and a product within which the two are still told to be attention."""
_HIDDEN = -1e8
"""Scores at or below this count as masked: finfo.min, -inf, -1e9. Above it, a row whose every score
is masked would keep the differences of its scores.
"""


@dataclasses.dataclass
class _Scores:
    """q k^T * scale plus masks, outermost first."""

    q: fx.Node | None = None
    k: fx.Node | None = None
    scale: float = 1.0
    dropout: float = 0.0
    added: list[tuple[fx.Node, float, bool]] = dataclasses.field(default_factory=list)
    """(addend, its factor, whether batch and heads are one dimension there)."""
    hidden: list[tuple[fx.Node, bool, float, bool]] = dataclasses.field(default_factory=list)
    """(condition, True where it is the condition to keep, score of what is hidden, as above)."""
    heads: tuple[Any, Any] | None = None
    """Sizes of batch and heads where q, k, v hold them as one dimension, and a mask does not."""


def fuse_attention(gm: fx.GraphModule) -> list[Skip]:
    """Rewrites every hand-written attention in place.

    Returns the nearest misses with a reason; their node is the product with the values.
    """
    skipped = []
    for node in list(gm.graph.nodes):
        if node.target not in _MATMUL or len(arguments(node)) != 2:
            continue
        softmax, dropout = _softmax_of(arguments(node)[0])
        found = _why_not_read(node) if softmax is None else _parse(node, softmax)
        if found is None:
            continue
        skip = found if isinstance(found, Skip) else None
        trace("softmax(q k^T) v -> scaled dot product attention", node, skip)
        if isinstance(found, Skip):
            skipped.append(Skip(found.reason, node))
            continue
        found.dropout = dropout
        new = inline(node, _attend, found.q, found.k, arguments(node)[1], found)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    drop_unused(gm)
    return skipped


def _attend(q: Any, k: Any, v: Any, scores: _Scores) -> Any:
    def mask_of(node: fx.Node, folded: bool) -> Any:
        return _unfold(q.tracer.proxy(node), scores.heads if folded else None)

    mask = None
    for node, factor, folded in scores.added:
        addend = mask_of(node, folded).to(q.dtype)
        addend = addend if factor == 1.0 else addend * factor
        mask = addend if mask is None else mask + addend
    for node, keep, value, folded in scores.hidden:
        condition = mask_of(node, folded)
        condition = condition if keep else condition.logical_not()
        if mask is None and math.isinf(value):
            mask = condition
            continue
        least = max(value, torch.finfo(q.dtype).min) if math.isfinite(value) else value
        if mask is None:
            mask = torch.zeros_like(condition, dtype=q.dtype)
        mask = _as_addend(mask, q).masked_fill(condition.logical_not(), least)
    q, k, v = (_unfold(tensor, scores.heads) for tensor in (q, k, v))
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=scores.dropout, scale=scores.scale
    )
    return attended if scores.heads is None else attended.flatten(0, 1)


def _unfold(tensor: Any, heads: tuple[Any, Any] | None) -> Any:
    """[batch * heads, ...] -> [batch, heads, ...]; what broadcasts over them stays."""
    if heads is None or tensor.dim() < 3:
        return tensor
    if isinstance(tensor.shape[0], int) and tensor.shape[0] == 1:
        return tensor.unsqueeze(0)
    batch, head = (tensor.tracer.proxy(h) if isinstance(h, fx.Node) else h for h in heads)
    return tensor.unflatten(0, (batch, head))


def _as_addend(mask: Any, q: Any) -> Any:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), float("-inf"))


def _is_softmax(node: fx.Node) -> bool:
    if node.target not in _SOFTMAX:
        return False
    return argument(node, 1, "dim") in (-1, example_value(node).dim() - 1)


def _softmax_of(probabilities: Any) -> tuple[fx.Node | None, float]:
    """(softmax, dropout) that a product reads, through casts, views and one dropout."""
    node, dropout = _through_casts(probabilities), 0.0
    for _ in range(4):
        if node is None or _is_softmax(node):
            break
        if node.target is F.dropout and dropout == 0.0:
            dropout = argument(node, 1, "p", 0.5) if argument(node, 2, "training", True) else 0.0
        elif not _folds_heads(node):
            return None, 0.0
        node = _through_casts(arguments(node)[0])
    return node if node is not None and _is_softmax(node) else None, float(dropout)


def _why_not_read(product: fx.Node) -> Skip | None:
    """The step that hides the softmax of an attention from its product; None: no attention."""
    node, hiding = arguments(product)[0], ""
    for _ in range(_HIDING_STEPS):
        if not is_tensor(node) or not arguments(node):
            return None
        if _is_softmax(node):
            scores = any(found.target in (*_MATMUL, *_BADDBMM) for found in ancestors(node)[1:])
            reason = f"the attention weights pass {hiding!r} before they meet the values"
            return Skip(reason, product) if scores and hiding else None
        hiding = hiding if is_call(node, "cast") else name_of(node)
        node = arguments(node)[0]
    return None


def _folds_heads(node: fx.Node) -> bool:
    """A view between [batch, heads, T, S] and [batch * heads, T, S]."""
    if node.target not in _VIEWS or not is_tensor(arguments(node)[0]):
        return False
    before, after = example_value(arguments(node)[0]), example_value(node)
    return {before.dim(), after.dim()} == {3, 4} and (
        str(before.shape[-2:]) == str(after.shape[-2:])
    )


def _through_casts(node: Any) -> fx.Node | None:
    while is_call(node, "cast") or (isinstance(node, fx.Node) and node.target == "contiguous"):
        node = arguments(node)[0]
    return node if is_tensor(node) else None


def _parse(product: fx.Node, softmax: fx.Node) -> _Scores | Skip:
    if len(softmax.users) > 1:
        return Skip("the attention weights are used by something else too", softmax)
    scores = _Scores()
    reason = _read_scores(arguments(softmax)[0], scores)
    if reason:
        return Skip(reason, softmax)
    q, k, v = scores.q, scores.k, arguments(product)[1]
    masks = [*(a[0] for a in scores.added), *(h[0] for h in scores.hidden)]
    inner = steps(product, q, k, v, *masks)
    if written_outside(inner - {product}):
        return Skip("the scores are written in place", product)
    if any(set(node.users) - inner for node in inner - {product} if _is_late(node, softmax)):
        return Skip("the attention weights are used by something else too", softmax)
    examples = [example_value(node) for node in (q, k, v)]
    if len({example.dtype for example in examples}) != 1:
        return Skip("query, key and value differ in dtype", product)
    if len({example.dim() for example in examples}) != 1 or examples[0].dim() < 3:
        return Skip("query, key and value differ in their number of dimensions", product)
    if any(str(e.shape[:-2]) != str(examples[0].shape[:-2]) for e in examples[1:]):
        return Skip("query, key and value broadcast over each other's batch or heads", product)
    return scores


def _is_late(node: fx.Node, softmax: fx.Node) -> bool:
    """Whether a step of the attention comes after the softmax."""
    return softmax < node


def _read_scores(node: Any, scores: _Scores) -> str | None:
    """Peels scale and masks off the scores, outermost first; returns why it stopped."""
    for _ in range(12):
        node = _through_casts(node)
        if node is None:
            return "the scores are no tensor of the graph"
        if node.target in _MATMUL:
            return _read_product(arguments(node)[0], arguments(node)[1], scores)
        if node.target in _BADDBMM:
            return _read_baddbmm(node, scores)
        folded = example_value(node).dim() == 3
        if _folds_heads(node):
            if not folded:
                sizes = arguments(node)[1:]
                scores.heads = tuple(sizes[0] if len(sizes) == 1 else sizes)[:2]
            node = arguments(node)[0]
        elif node.target in _MASKED_FILL and _hides(argument(node, 2, "value"), scores):
            value = argument(node, 2, "value") * scores.scale
            scores.hidden.append((arguments(node)[1], False, value, folded))
            node = arguments(node)[0]
        elif node.target is torch.where and _hides(arguments(node)[2], scores):
            value = arguments(node)[2] * scores.scale
            scores.hidden.append((arguments(node)[0], True, value, folded))
            node = arguments(node)[1]
        elif _is_sum(node):
            inner, addend = _split_sum(node)
            scores.added.append((addend, scores.scale, folded))
            node = inner
        elif is_call(node, "mul") or is_call(node, "div"):
            scaled, factor = arguments(node)[:2]
            if is_call(node, "mul") and not is_tensor(scaled):
                scaled, factor = factor, scaled
            if not isinstance(factor, int | float):
                return "the scores are scaled by a tensor"
            scores.scale *= factor if is_call(node, "mul") else 1.0 / factor
            node = scaled
        else:
            return f"the scores are computed with {name_of(node)!r}"
    return "more steps between the product and the softmax than are read"


def _is_sum(node: fx.Node) -> bool:
    return (
        is_call(node, "add") and len(arguments(node)) == 2 and all(map(is_tensor, arguments(node)))
    )


def _read_baddbmm(node: fx.Node, scores: _Scores) -> str | None:
    """beta * addend + alpha * q k^T"""
    addend = argument(node, 0, "input")
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return "the scores are scaled by a tensor"
    if beta:
        scores.added.append((addend, scores.scale * beta, True))
    scores.scale *= alpha
    return _read_product(argument(node, 1, "batch1"), argument(node, 2, "batch2"), scores)


def _split_sum(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, mask): the operand that leads to a product of two activations is the scores."""
    first, second = arguments(node)
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if _leads_to_product(first) else (second, first)


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if node.target in _MATMUL or node.target in _BADDBMM:
            return True
        if not arguments(node) or not isinstance(arguments(node)[0], fx.Node):
            return False
        node = arguments(node)[0]
    return False


def _read_product(q: Any, transposed: Any, scores: _Scores) -> str | None:
    if not is_tensor(q) or not is_tensor(transposed):
        return "the scores are no product of two tensors"
    k = _untransposed(transposed)
    if k is None:
        return "the key is not transposed by a call that is read"
    scores.q, scores.k = q, k
    return None


def _untransposed(node: fx.Node) -> fx.Node | None:
    """k for k.transpose(-2, -1), k.mT and k.permute(..., -1, -2)."""
    rank = example_value(node).dim()
    if node.target in _TRANSPOSE:
        dims = {int(d) % rank for d in arguments(node)[1:3]}
        return arguments(node)[0] if dims == {rank - 2, rank - 1} else None
    if node.target is getattr and arguments(node)[1] == "mT":
        return arguments(node)[0]
    if node.target in ("permute", torch.permute):
        order = arguments(node)[1] if len(arguments(node)) == 2 else arguments(node)[1:]
        wanted = [*range(rank - 2), rank - 1, rank - 2]
        return arguments(node)[0] if [int(d) % rank for d in order] == wanted else None
    return None


def _hides(value: Any, scores: _Scores) -> bool:
    return isinstance(value, int | float) and value * scores.scale <= _HIDDEN
