"""Multi-head attention over any four projections: out(softmax(q k^T / sqrt(d) + mask) v).

The one place where this formula stands: `TernaryMultiheadAttention` runs it, the backend traces it.
It agrees with `torch.nn.functional.multi_head_attention_forward` on every combination of its
arguments, and reads no sizes that may be dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

Projection = Callable[[torch.Tensor], torch.Tensor]


def multihead_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    project_q: Projection,
    project_k: Projection,
    project_v: Projection,
    project_out: Projection,
    *,
    num_heads: int,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    training: bool,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends from `query` [B, T, E] to `key` [B, S, Ek] and `value` [B, S, Ev].

    Args:
        project_q: [B, T, E] -> [B, T, H * D]; `project_k`, `project_v` likewise;
            `project_out` [B, T, H * D] -> [B, T, E].
        bias_k: [1, 1, H * D], one more key after the last, and `bias_v` its value; both or neither.
        add_zero_attn: one more key and value of zeros.
        key_padding_mask: [B, S]; True hides a key, floating point is added to the scores.
        attn_mask: [T, S], [B * H, T, S] or [B, H, T, S]; True hides a key, floating point is added.
        is_causal: says that `attn_mask` is the causal mask, which then need not be read.

    Returns:
        Output [B, T, E]; and, where `need_weights`, the weights: [B, T, S], averaged over heads,
        or [B, H, T, S].
    """
    q, k, v = project_q(query), project_k(key), project_v(value)
    # As torch does: the hint replaces the mask only where nothing else needs the mask.
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _merge(attn_mask, key_padding_mask, num_heads, query.dtype)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, _pad_sequence(k)[:, -1:] + bias_k], dim=1)
        v = torch.cat([v, _pad_sequence(v)[:, -1:] + bias_v], dim=1)
        mask = _pad_keys(mask)
    if add_zero_attn:
        k, v, mask = _pad_sequence(k), _pad_sequence(v), _pad_keys(mask)
    q, k, v = (_split_heads(x, num_heads) for x in (q, k, v))
    dropout_p = dropout_p if training else 0.0
    if not need_weights:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
        return project_out(_merge_heads(attended)), None
    scores = torch.matmul(q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    output = project_out(_merge_heads(torch.matmul(weights, v)))
    return output, weights.mean(dim=1) if average_attn_weights else weights


def _merge(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    num_heads: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Both masks -> one to add to the scores, broadcast to [B, H, T, S]."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, dtype)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """True -> -inf, False -> 0; floating point as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _pad_sequence(x: torch.Tensor) -> torch.Tensor:
    """[B, S, E] -> [B, S + 1, E], zeros last."""
    return F.pad(x, (0, 0, 0, 1))


def _pad_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Nothing is hidden behind the added key."""
    return None if mask is None else F.pad(mask, (0, 1))


def _split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)
