"""Attention of one token over a static KV cache, as two Triton kernels: what every way of
bench_model_cuda.py calls, so that the products make the difference.

Rotary embedding, the write of the new key and value, and scores over the filled cache, cut in
parts that run side by side; then the parts are joined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PARTS = 8


@triton.jit
def _turned(pointer, cos, sin, HALF: tl.constexpr):
    """Rotary embedding of heads [n, 2 HALF] at pointer [n, HALF]: both halves, rounded."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    first, second = tl.load(pointer).to(tl.float32), tl.load(pointer + HALF).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _part(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr, mixed_ptr, sums_ptr,
    context, GROUP: tl.constexpr, HALF: tl.constexpr, LENGTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One head of the cache, LENGTH places of it -> unnormalised output, largest score, sum."""
    head, part = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = 2 * HALF
    position = tl.load(position_ptr)
    half, whole = tl.arange(0, HALF), tl.arange(0, width)
    cos, sin = tl.load(cos_ptr + half)[None, :], tl.load(sin_ptr + half)[None, :]
    query = tl.arange(0, 16)
    of_head = head * GROUP + tl.minimum(query, GROUP - 1)
    q1, q2 = _turned(q_ptr + of_head[:, None] * width + half[None, :], cos, sin, HALF)
    k1, k2 = _turned(k_ptr + head * width + half[None, :], cos, sin, HALF)
    new_v = tl.load(v_ptr + head * width + whole)
    place = part * LENGTH + tl.arange(0, LENGTH)
    cache = (head * context + place) * width
    old = (place < position)[:, None]
    key1 = tl.load(keys_ptr + cache[:, None] + half[None, :], mask=old, other=0.0)
    key2 = tl.load(keys_ptr + cache[:, None] + HALF + half[None, :], mask=old, other=0.0)
    value = tl.load(values_ptr + cache[:, None] + whole[None, :], mask=old, other=0.0)
    new = (place == position)[:, None]
    key1, key2 = tl.where(new, k1, key1), tl.where(new, k2, key2)
    value = tl.where(new, new_v[None, :], value)
    scores = tl.dot(q2, tl.trans(key2), acc=tl.dot(q1, tl.trans(key1)))
    scores = scores * (1.0 / tl.sqrt(width * 1.0))
    scores = tl.where((place <= position)[None, :], scores, -1e30)
    largest = tl.max(scores, axis=1)
    weights = tl.exp(scores - largest[:, None])
    mixed = tl.dot(weights.to(value.dtype), value)
    out = (head * PARTS + part) * 16 + query
    tl.store(mixed_ptr + out[:, None] * width + whole[None, :], mixed)
    tl.store(sums_ptr + 2 * out, largest)
    tl.store(sums_ptr + 2 * out + 1, tl.sum(weights, axis=1))
    if position // LENGTH == part:
        here = (head * context + position) * width
        tl.store(keys_ptr + here + half[None, :], k1)
        tl.store(keys_ptr + here + HALF + half[None, :], k2)
        tl.store(values_ptr + here + whole, new_v)


@triton.jit
def _join(
    mixed_ptr, sums_ptr, out_ptr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """The parts of one query head -> its output."""
    head = tl.program_id(0)
    part, k = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    row = (head // GROUP * PARTS + part) * 16 + head % GROUP
    largest = tl.load(sums_ptr + 2 * row)
    share = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(share * tl.load(sums_ptr + 2 * row + 1), axis=0)
    mixed = tl.load(mixed_ptr + row[:, None] * WIDTH + k[None, :])
    out = tl.sum(mixed * share[:, None], axis=0) / total
    tl.store(out_ptr + head * WIDTH + k, out.to(out_ptr.dtype.element_ty))


@torch.library.custom_op("benchmark::token_attention", mutates_args=("keys", "values"))
def token_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """q [1, 1, H * D], k, v [1, 1, G * D], cos, sin [1, D / 2] of `position` [1], keys, values
    [1, G, context, D] -> [1, 1, H * D].
    """
    _, heads, context, width = keys.shape
    group = q.shape[-1] // (heads * width)
    parts = q.new_empty((heads, PARTS, 16, width), dtype=torch.float32)
    sums = q.new_empty((heads, PARTS, 16, 2), dtype=torch.float32)
    out = torch.empty_like(q)
    length = context // PARTS
    _part[(heads, PARTS)](
        q, k, v, cos, sin, position, keys, values, parts, sums, context, group, width // 2,
        length, PARTS, num_warps=4,
    )  # fmt: skip
    _join[(heads * group,)](parts, sums, out, group, width, PARTS, num_warps=4)
    return out


@token_attention.register_fake
def _(q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)
