"""attention(q, k, v) -> softmax(q k^T * scale) v in fp32, causal, or with a mask, or neither.

Heads of q may share those of k and v: head h reads head h * G // H. The result lies as the
projection behind it reads it, [B, L, H, Dv], and is seen as [B, H, L, Dv].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ternc.errors import KernelError
from ternc.runtime.ops.definition import OpDefinition


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Raise KernelError for what no kernel takes."""
    if any(t.dim() != 4 or t.dtype != torch.float32 for t in (q, k, v)):
        given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (q, k, v))
        raise KernelError(f"ternc::attention: q, k, v are {given}, not float32 [B, heads, L, D]")
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not fits or k.shape[2] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise KernelError(f"ternc::attention: q, k, v do not fit together: {shapes}")
    if mask is not None and (mask.dim() not in (2, 3, 4) or mask.dtype != torch.bool):
        given = f"{mask.dtype} {list(mask.shape)}"
        raise KernelError(f"ternc::attention: mask is {given}, not bool of 2 to 4 dimensions")
    sizes = (*q.shape[:3], k.shape[2])
    if mask is not None and not _broadcasts(mask.shape, sizes):
        given = f"{list(mask.shape)}, wanted {list(sizes)}"
        raise KernelError(f"ternc::attention: mask does not fit q and k: {given}")


def _broadcasts(shape: torch.Size, sizes: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(sizes), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, H, L, D], k [B, G, S, D], v [B, G, S, Dv] fp32, G divides H -> [B, H, L, Dv].

    causal: query i sees keys 0 to i. mask: bool, broadcast to [B, H, L, S]; True shows a key. A
    query that sees no key gives 0.
    """
    check(q, k, v, mask)
    if causal and mask is not None:
        mask, causal = mask & _past(q.shape[2], k.shape[2], q.device), False
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _past(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    check(q, k, v, mask)
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.causal, mask = inputs
    ctx.save_for_backward(*tensors, mask)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """p = softmax(s), s = q k^T * scale: ds = p * (dp - sum(dp * p)); the weights are made anew."""
    q, k, v, mask = ctx.saved_tensors
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]
    q, grad = (t.unflatten(1, (groups, shared)) for t in (q, grad))
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    scores = q @ k.mT * ctx.scale
    if ctx.causal:
        scores = scores.masked_fill(
            ~_past(scores.shape[-2], scores.shape[-1], q.device), float("-inf")
        )
    if mask is not None:
        shown = mask.broadcast_to(*q.shape[:1], groups * shared, *scores.shape[-2:])
        scores = scores.masked_fill(~shown.unflatten(1, (groups, shared)), float("-inf"))
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
    along = grad @ v.mT
    along = weights * (along - (along * weights).sum(-1, keepdim=True)) * ctx.scale
    dq, dk, dv = along @ k, along.mT @ q, weights.mT @ grad
    return dq.flatten(1, 2), dk.sum(2), dv.sum(2), None, None, None


ATTENTION = OpDefinition(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? mask=None) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
)
