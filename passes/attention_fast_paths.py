"""torch.nn's attention as single nodes -> projections (F.linear) and scaled dot product attention.

`F.multi_head_attention_forward`, `torch._native_multi_head_attention` and
`torch._transformer_encoder_layer_fwd` hide their weights from every rule; here they become the
float computation that they stand for.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.attention_math import multihead_attention
from ternc.passes.graph import example_value
from ternc.passes.inline import inline
from ternc.passes.rule import Skip

Projection = Callable[[torch.Tensor], torch.Tensor]


def decompose_attention(gm: fx.GraphModule) -> list[Skip]:
    """Decomposes every fused attention node in place; returns those left alone, with the reason."""
    decompositions: dict[Any, Callable[..., Any]] = {
        F.multi_head_attention_forward: _attention_forward,
        torch._native_multi_head_attention: _native_attention,
        torch._transformer_encoder_layer_fwd: _encoder_layer,
    }
    skipped = []
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in decompositions:
            continue
        function = decompositions[node.target]
        bound = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
        if reason := _why_not(node, bound):
            skipped.append(Skip(reason, node))
            continue
        if isinstance(example_value(node), tuple) and not _reads_weights(node):
            bound["need_weights"] = False
        _replace(node, inline(node, function, **bound))
    return skipped


def _why_not(node: fx.Node, bound: dict[str, Any]) -> str | None:
    examples = [example_value(value) for value in bound.values() if isinstance(value, fx.Node)]
    if any(isinstance(example, torch.Tensor) and example.is_nested for example in examples):
        return "attention over nested tensors is left to torch"
    if bound.get("static_k") is not None or bound.get("static_v") is not None:
        return "attention with precomputed keys or values (static_k, static_v) is left to torch"
    if isinstance(example_value(node), tuple) and any(
        user.target is not operator.getitem for user in node.users
    ):
        return "the outputs of attention are used as a whole tuple"
    return None


def _reads_weights(node: fx.Node) -> bool:
    """Whether something reads the second output, the attention weights."""
    return any(user.args[1] == 1 and user.users for user in node.users)


def _replace(node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            value = result[user.args[1]]
            if isinstance(value, fx.Node):
                user.replace_all_uses_with(value)
            if not user.users:
                node.graph.erase_node(user)
    node.graph.erase_node(node)


def _named(weight: Any, suffix: str) -> Any:
    """Marks a slice of a stacked weight so that its site is called `<owner>.<suffix>`."""
    weight.node.meta["ternc_suffix"] = suffix
    return weight


def _project(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    return lambda x: F.linear(x, weight, bias)


def _stacked_projections(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    width: int,
) -> tuple[Projection, Projection, Projection]:
    """q, k, v from one weight [3 E, E]: one product where all three read the same tensor."""

    def rows(start: int, stop: int, suffix: str) -> Projection:
        part = None if bias is None else bias[start:stop]
        return _project(_named(weight[start:stop], suffix), part)

    if _same(query, key) and _same(key, value):
        q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
        return (lambda _: q), (lambda _: k), (lambda _: v)
    if _same(key, value):
        k, v = rows(width, 3 * width, "kv")(key).chunk(2, dim=-1)
        return rows(0, width, "q"), (lambda _: k), (lambda _: v)
    return (
        rows(0, width, "q"),
        rows(width, 2 * width, "k"),
        rows(2 * width, 3 * width, "v"),
    )


def _same(a: Any, b: Any) -> bool:
    return a.node is b.node


def _attention_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`F.multi_head_attention_forward`: [T, B, E] (or unbatched [T, E]) in and out."""
    batched = query.dim() == 3
    distinct: dict[Any, torch.Tensor] = {}
    for tensor in (query, key, value):
        if tensor.node not in distinct:
            distinct[tensor.node] = tensor.transpose(0, 1) if batched else tensor.unsqueeze(0)
    query, key, value = (distinct[tensor.node] for tensor in (query, key, value))
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        width = embed_dim_to_check
        q, k, v = (
            _project(weight, None if in_proj_bias is None else in_proj_bias[row : row + width])
            for weight, row in zip(
                (q_proj_weight, k_proj_weight, v_proj_weight), (0, width, 2 * width), strict=True
            )
        )
    else:
        q, k, v = _stacked_projections(
            query, key, value, in_proj_weight, in_proj_bias, embed_dim_to_check
        )
    output, weights = multihead_attention(
        query,
        key,
        value,
        q,
        k,
        v,
        _project(out_proj_weight, out_proj_bias),
        num_heads=num_heads,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p,
        training=training,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        is_causal=is_causal,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
    )
    if batched:
        return output.transpose(0, 1), weights
    return output.squeeze(0), None if weights is None else weights.squeeze(0)


def _native_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`torch._native_multi_head_attention`: batch first; any non-zero mask element hides a key.

    mask_type: 0 = attention mask [T, S], 1 = key padding [B, S], 2 = merged [B, H, T, S].
    """
    if mask is not None:
        mask = mask.to(torch.bool)
    padding = mask if mask_type == 1 else None
    return multihead_attention(
        query,
        key,
        value,
        *_stacked_projections(query, key, value, qkv_weight, qkv_bias, embed_dim),
        _project(proj_weight, proj_bias),
        num_heads=num_heads,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        training=False,
        key_padding_mask=padding,
        attn_mask=None if padding is not None else mask,
        is_causal=False,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
    )


def _encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    linear1_weight: torch.Tensor,
    linear1_bias: torch.Tensor,
    linear2_weight: torch.Tensor,
    linear2_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """`torch._transformer_encoder_layer_fwd`, batch first, inference only."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        output, _ = _native_attention(
            x, x, x, embed_dim, num_heads, *weights, mask, need_weights=False, mask_type=mask_type
        )
        return output

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, linear1_weight, linear1_bias)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, linear2_weight, linear2_bias)

    def norm1(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    if norm_first:
        src = src + attend(norm1(src))
        return src + feed_forward(norm2(src))
    src = norm1(src + attend(src))
    return norm2(src + feed_forward(src))
