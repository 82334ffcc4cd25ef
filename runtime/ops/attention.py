"""attention(q, k, v) -> softmax(q k^T * scale) v, with or without a causal mask, in fp32.

Heads of q may share those of k and v: head h reads head h * G // H. The result lies as the
projection behind it reads it, [B, L, H, Dv], and is seen as [B, H, L, Dv].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ternc.errors import KernelError
from ternc.runtime.ops.definition import OpDefinition


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise KernelError for what no kernel takes."""
    if any(t.dim() != 4 or t.dtype != torch.float32 for t in (q, k, v)):
        given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (q, k, v))
        raise KernelError(f"ternc::attention: q, k, v are {given}, not float32 [B, heads, L, D]")
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not fits or k.shape[2] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise KernelError(f"ternc::attention: q, k, v do not fit together: {shapes}")


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """q [B, H, L, D], k [B, G, S, D], v [B, G, S, Dv] fp32, G divides H -> [B, H, L, Dv].

    causal: query i sees keys 0 to i.
    """
    check(q, k, v)
    y = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    check(q, k, v)
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """p = softmax(s), s = q k^T * scale: ds = p * (dp - sum(dp * p)); the weights are made anew."""
    q, k, v = ctx.saved_tensors
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]
    q, grad = (t.unflatten(1, (groups, shared)) for t in (q, grad))
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    scores = q @ k.mT * ctx.scale
    if ctx.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1)
    along = grad @ v.mT
    along = weights * (along - (along * weights).sum(-1, keepdim=True)) * ctx.scale
    dq, dk, dv = along @ k, along.mT @ q, weights.mT @ grad
    return dq.flatten(1, 2), dk.sum(2), dv.sum(2), None, None


ATTENTION = OpDefinition(
    name="attention",
    schema="(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
)
