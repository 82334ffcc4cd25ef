"""`TernaryMultiheadAttention`: nn.MultiheadAttention with four projections that are modules.

    in_proj_weight [3 E, E] (or q, k, v apart), out_proj -> q_proj, k_proj, v_proj, out_proj

Each projection is a TernaryLinear, or an nn.Linear where its weight stays floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ternc.attention_math import multihead_attention
from ternc.errors import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class TernaryMultiheadAttention(nn.Module):
    """Takes the arguments of `nn.MultiheadAttention` and returns what it returns.

    `in_proj_weight`, `in_proj_bias` and `{q,k,v}_proj_weight` are None, so that no fused path of
    torch can read around the projections. Nested tensors are refused.
    """

    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        *,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias_k: torch.Tensor | None = None,
        bias_v: torch.Tensor | None = None,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._qkv_same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.bias_k, self.bias_v = bias_k, bias_v
        for name in _FLOAT_WEIGHTS:
            self.register_parameter(name, None)
        self.register_parameter("in_proj_bias", None)

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, projections: dict[str, nn.Module]
    ) -> TernaryMultiheadAttention:
        """`attention` with the four modules named in `PROJECTIONS` in the place of its weights."""
        return cls(
            **projections,
            embed_dim=attention.embed_dim,
            num_heads=attention.num_heads,
            dropout=attention.dropout,
            bias_k=attention.bias_k,
            bias_v=attention.bias_v,
            add_zero_attn=attention.add_zero_attn,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention.forward`, shapes and masks included.

        Raises:
            InputError: shapes that do not fit, a nested tensor, or `is_causal` without `attn_mask`.
        """
        _check(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each(lambda x: x.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        output, weights = multihead_attention(
            query,
            key,
            value,
            self.q_proj,
            self.k_proj,
            self.v_proj,
            self.out_proj,
            num_heads=self.num_heads,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            dropout_p=self.dropout,
            training=self.training,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def extra_repr(self) -> str:
        size = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{size}, batch_first={self.batch_first}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also takes the keys of `nn.MultiheadAttention`: they are handed to the projections."""
        stacked = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
        for old, new in stacked.items():
            tensor = state_dict.get(prefix + old)
            # Another shape is left alone, and reported as an unexpected key.
            if isinstance(tensor, torch.Tensor) and tensor.shape[:1] == (3 * self.embed_dim,):
                del state_dict[prefix + old]
                for name, part in zip(PROJECTIONS, tensor.chunk(3), strict=False):
                    state_dict[f"{prefix}{name}.{new}"] = part
        for name in PROJECTIONS[:3]:
            if (tensor := state_dict.pop(f"{prefix}{name}_weight", None)) is not None:
                state_dict[f"{prefix}{name}.weight"] = tensor
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _each(
    view: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`view` of all three; one tensor stays one, so that projections of it can be fused."""
    q = view(query)
    k = q if key is query else view(key)
    return q, k, k if value is key else q if value is query else view(value)


_FLOAT_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def split_projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The four projections of `attention` as float Linears, by the names in `PROJECTIONS`.

    They share the memory of its weights: a stacked weight is cut into views of itself.
    """
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    stacked = attention.in_proj_bias
    biases = (None,) * 3 if stacked is None else stacked.chunk(3)
    projections = {
        name: _linear(weight, bias)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=False)
    }
    return {**projections, "out_proj": attention.out_proj}


def separate_float_projections(projections: dict[str, nn.Module]) -> None:
    """Copies the weights that stay floating point: a view would keep the stacked weight alive."""
    for name in PROJECTIONS[:3]:
        if isinstance(linear := projections[name], nn.Linear):
            linear.weight = nn.Parameter(linear.weight.clone(), linear.weight.requires_grad)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _check(
    module: TernaryMultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:
    """Raises InputError for what `nn.MultiheadAttention` does not take, and nested tensors."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise InputError("attention over nested tensors is not supported; pad them and pass a mask")
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise InputError(
            f"query, key, value have {query.dim()}, {key.dim()}, {value.dim()} dimensions; all 3 "
            "(batched) or all 2 are wanted"
        )
    if is_causal and attn_mask is None:
        raise InputError("is_causal=True is a hint about attn_mask: pass the causal mask too")
    sequence = 1 if query.dim() == 3 and module.batch_first else 0
    target, source = query.shape[sequence], key.shape[sequence]
    batch = query.shape[1 - sequence] if query.dim() == 3 else 1
    if value.shape[:-1] != key.shape[:-1] or (key.dim() == 3 and key.shape[1 - sequence] != batch):
        raise InputError(
            f"key {list(key.shape)} and value {list(value.shape)} do not fit query "
            f"{list(query.shape)}"
        )
    if attn_mask is not None:
        wanted = [(target, source), (batch * module.num_heads, target, source)]
        if tuple(attn_mask.shape) not in wanted:
            raise InputError(f"attn_mask is {list(attn_mask.shape)}, not one of {wanted}")
    if key_padding_mask is not None:
        size = (batch, source) if query.dim() == 3 else (source,)
        if tuple(key_padding_mask.shape) != size:
            raise InputError(f"key_padding_mask is {list(key_padding_mask.shape)}, not {size}")
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"a mask is {mask.dtype}; bool and floating point are taken")
