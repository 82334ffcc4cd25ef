"""Attention of one token over a static KV cache, as one Triton kernel, and the best token: what
every way of bench_model_cuda.py calls, so that the products make the difference.

Rotary embedding, the write of the new key and value, and scores over the filled cache, cut in
parts that run side by side; the last part of a head to arrive joins them. The keys and values of
earlier tokens are read before the kernel ahead has ended: nothing of one step writes them twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch

PARTS = 8
"""Parts of a head's cache: places in the cache are a multiple of it times 16."""


@triton.jit
def _turned(pointer, cos, sin, HALF: tl.constexpr):
    """Rotary embedding of heads [n, 2 HALF] at pointer [n, HALF]: both halves, rounded."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    first, second = tl.load(pointer).to(tl.float32), tl.load(pointer + HALF).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _attention(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr, arrived_ptr,
    mixed_ptr, sums_ptr, out_ptr, context, GROUP: tl.constexpr, HALF: tl.constexpr,
    LENGTH: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of the cache and LENGTH places of it; the last part of the head writes out."""
    head, part = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = 2 * HALF
    position = tl.load(position_ptr)
    half, whole = tl.arange(0, HALF), tl.arange(0, width)
    place = part * LENGTH + tl.arange(0, LENGTH)
    cache = (head * context + place) * width
    old = (place < position)[:, None]
    key1 = tl.load(keys_ptr + cache[:, None] + half[None, :], mask=old, other=0.0)
    key2 = tl.load(keys_ptr + cache[:, None] + HALF + half[None, :], mask=old, other=0.0)
    value = tl.load(values_ptr + cache[:, None] + whole[None, :], mask=old, other=0.0)
    cos = tl.load(cos_ptr + position * HALF + half)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half)[None, :]
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    query = tl.arange(0, 16)
    of_head = head * GROUP + tl.minimum(query, GROUP - 1)
    q1, q2 = _turned(q_ptr + of_head[:, None] * width + half[None, :], cos, sin, HALF)
    k1, k2 = _turned(k_ptr + head * width + half[None, :], cos, sin, HALF)
    new_v = tl.load(v_ptr + head * width + whole)
    new = (place == position)[:, None]
    key1, key2 = tl.where(new, k1, key1), tl.where(new, k2, key2)
    value = tl.where(new, new_v[None, :], value)
    scores = tl.dot(q2, tl.trans(key2), acc=tl.dot(q1, tl.trans(key1)))
    scores = scores * (1.0 / tl.sqrt(width * 1.0))
    scores = tl.where((place <= position)[None, :], scores, -1e30)
    largest = tl.max(scores, axis=1)
    weights = tl.exp(scores - largest[:, None])
    mixed = tl.dot(weights.to(value.dtype), value)
    kept = query < GROUP
    out = (head * PARTS + part) * GROUP + query
    tl.store(mixed_ptr + out[:, None] * width + whole[None, :], mixed, mask=kept[:, None])
    tl.store(sums_ptr + 2 * out, largest, mask=kept)
    tl.store(sums_ptr + 2 * out + 1, tl.sum(weights, axis=1), mask=kept)
    if position // LENGTH == part:
        here = (head * context + position) * width
        tl.store(keys_ptr + here + half[None, :], k1)
        tl.store(keys_ptr + here + HALF + half[None, :], k2)
        tl.store(values_ptr + here + whole, new_v)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == PARTS - 1:
        tl.store(arrived_ptr + head, 0)  # for the next token
        _join(mixed_ptr, sums_ptr, out_ptr, head, GROUP, width, PARTS)


@triton.jit
def _join(
    mixed_ptr, sums_ptr, out_ptr, head, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of a head of the cache -> the outputs of its queries."""
    query, part = tl.arange(0, GROUP)[:, None], tl.arange(0, PARTS)[None, :]
    k = tl.arange(0, WIDTH)
    row = (head * PARTS + part) * GROUP + query
    largest = tl.load(sums_ptr + 2 * row, cache_modifier=".cg")
    total = tl.load(sums_ptr + 2 * row + 1, cache_modifier=".cg")
    mixed = tl.load(mixed_ptr + row[:, :, None] * WIDTH + k[None, None, :], cache_modifier=".cg")
    share = tl.exp(largest - tl.max(largest, axis=1)[:, None])
    share = share / tl.sum(share * total, axis=1)[:, None]
    out = tl.sum(mixed * share[:, :, None], axis=1)
    place = (head * GROUP + tl.arange(0, GROUP))[:, None] * WIDTH + k[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))


@torch.library.custom_op("benchmark::token_attention", mutates_args=("keys", "values", "arrived"))
def token_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    arrived: torch.Tensor,
) -> torch.Tensor:
    """q [1, 1, H * D], k, v [1, 1, G * D], cos, sin fp32 [context, D / 2], position [1], keys,
    values [1, G, context, D], arrived int32 [G], zeros -> [1, 1, H * D].
    """
    _, heads, context, width = keys.shape
    group = q.shape[-1] // (heads * width)
    parts = q.new_empty((heads, PARTS, group, width), dtype=torch.float32)
    sums = q.new_empty((heads, PARTS, group, 2), dtype=torch.float32)
    out = torch.empty_like(q)
    dependent = launch.dependent_launch(q.device)
    _attention[(heads, PARTS)](
        q, k, v, cos, sin, position, keys, values, arrived, parts, sums, out, context, group,
        width // 2, context // PARTS, PARTS, dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return out


@token_attention.register_fake
def _(q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


def best_token(logits: torch.Tensor, width: int = 256) -> torch.Tensor:
    """logits [1, 1, V], V a multiple of `width` -> argmax [1, 1]; of parts first, then of those."""
    largest, place = logits.view(1, 1, -1, width).max(-1)
    part = largest.argmax(-1, keepdim=True)
    return (part * width + place.gather(-1, part))[..., 0]
