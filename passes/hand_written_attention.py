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
from ternc.passes.mutation import drop_unused
from ternc.passes.region import steps, written_outside
from ternc.passes.rule import Skip

_MATMUL = {torch.matmul, torch.bmm, operator.matmul, torch.Tensor.matmul, "matmul", "bmm"}
_SOFTMAX = {F.softmax, torch.softmax, "softmax"}
_TRANSPOSE = {"transpose", torch.transpose, "swapaxes", torch.swapaxes}
_MASKED_FILL = {"masked_fill", torch.masked_fill}
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
    added: list[fx.Node] = dataclasses.field(default_factory=list)
    hidden: list[tuple[fx.Node, bool, float]] = dataclasses.field(default_factory=list)
    """(condition, True where it is the condition to keep, score of what is hidden)."""


def fuse_attention(gm: fx.GraphModule) -> list[Skip]:
    """Rewrites every hand-written attention in place; returns the nearest misses with a reason."""
    skipped = []
    for node in list(gm.graph.nodes):
        if node.target not in _MATMUL or len(arguments(node)) != 2:
            continue
        probabilities = _through_casts(arguments(node)[0])
        if probabilities is None or not _is_softmax(probabilities):
            continue
        found = _parse(node, probabilities)
        if isinstance(found, Skip):
            skipped.append(found)
            continue
        new = inline(node, _attend, found.q, found.k, arguments(node)[1], found)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    drop_unused(gm)
    return skipped


def _attend(q: Any, k: Any, v: Any, scores: _Scores) -> Any:
    mask = None
    for node in scores.added:
        addend = _proxy(q, node).to(q.dtype)
        mask = addend if mask is None else mask + addend
    for node, keep, value in scores.hidden:
        condition = _proxy(q, node)
        condition = condition if keep else condition.logical_not()
        if mask is None and math.isinf(value):
            mask = condition
            continue
        least = max(value, torch.finfo(q.dtype).min) if math.isfinite(value) else value
        if mask is None:
            mask = torch.zeros_like(condition, dtype=q.dtype)
        mask = _as_addend(mask, q).masked_fill(condition.logical_not(), least)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)


def _proxy(like: Any, node: fx.Node) -> Any:
    return like.tracer.proxy(node)


def _as_addend(mask: Any, q: Any) -> Any:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask.logical_not(), float("-inf"))


def _is_softmax(node: fx.Node) -> bool:
    if node.target not in _SOFTMAX:
        return False
    return argument(node, 1, "dim") in (-1, example_value(node).dim() - 1)


def _through_casts(node: Any) -> fx.Node | None:
    while is_call(node, "cast") or (isinstance(node, fx.Node) and node.target == "contiguous"):
        node = arguments(node)[0]
    return node if is_tensor(node) else None


def _parse(product: fx.Node, softmax: fx.Node) -> _Scores | Skip:
    if any(user is not product and not is_call(user, "cast") for user in softmax.users):
        return Skip("the attention weights are used by something else too", softmax)
    scores = _Scores()
    reason = _read_scores(arguments(softmax)[0], scores)
    if reason:
        return Skip(reason, softmax)
    q, k, v = scores.q, scores.k, arguments(product)[1]
    conditions = [condition for condition, _, _ in scores.hidden]
    inner = steps(product, q, k, v, *scores.added, *conditions)
    if written_outside(inner - {product}):
        return Skip("the scores are written in place", product)
    examples = [example_value(node) for node in (q, k, v)]
    if len({example.dtype for example in examples}) != 1:
        return Skip("query, key and value differ in dtype", product)
    if len({example.dim() for example in examples}) != 1 or examples[0].dim() < 3:
        return Skip("query, key and value differ in their number of dimensions", product)
    if any(str(e.shape[:-2]) != str(examples[0].shape[:-2]) for e in examples[1:]):
        return Skip("query, key and value broadcast over each other's batch or heads", product)
    return scores


def _read_scores(node: Any, scores: _Scores) -> str | None:
    """Peels scale and masks off the scores, outermost first; returns why it stopped."""
    for _ in range(12):
        node = _through_casts(node)
        if node is None:
            return "the scores are no tensor of the graph"
        if node.target in _MATMUL:
            return _read_product(node, scores)
        if node.target in _MASKED_FILL and _hides(argument(node, 2, "value"), scores):
            value = argument(node, 2, "value") * scores.scale
            scores.hidden.append((arguments(node)[1], False, value))
            node = arguments(node)[0]
        elif node.target is torch.where and _hides(arguments(node)[2], scores):
            value = arguments(node)[2] * scores.scale
            scores.hidden.append((arguments(node)[0], True, value))
            node = arguments(node)[1]
        elif (
            is_call(node, "add")
            and len(arguments(node)) == 2
            and all(map(is_tensor, arguments(node)))
        ):
            if scores.scale != 1.0:
                return "the scores are scaled after the mask was added"
            inner, addend = _split_sum(node)
            scores.added.append(addend)
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
            return f"the scores are computed with {node.target!s}"
    return "more steps between the product and the softmax than are read"


def _split_sum(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(scores, mask): the operand that leads to a product of two activations is the scores."""
    first, second = arguments(node)
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return (first, second) if _leads_to_product(first) else (second, first)


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(8):
        if node.target in _MATMUL:
            return True
        if not arguments(node) or not isinstance(arguments(node)[0], fx.Node):
            return False
        node = arguments(node)[0]
    return False


def _read_product(node: fx.Node, scores: _Scores) -> str | None:
    q, transposed = arguments(node)
    if not is_tensor(q) or not is_tensor(transposed):
        return "the scores are no product of two tensors"
    assert isinstance(transposed, fx.Node)
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
