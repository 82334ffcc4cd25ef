"""token_linears1..4(x) -> products of the normalised x, or their activation: the op's signature.

One launch of the one-token kernel where it takes the weights; else the fused norm, the products and
the activation one after another.
"""

from __future__ import annotations

import torch

from ternc.runtime import dispatch
from ternc.runtime.kernels.triton import linear_int8, select
from ternc.runtime.kernels.triton.fused_quantize import norm_quantize
from ternc.runtime.kernels.triton.linear import all_packed, linears
from ternc.runtime.kernels.triton.linear_gemv import Norm, linear_gemv
from ternc.runtime.kernels.triton.product import Product, alike
from ternc.runtime.kernels.triton.weight import Weight
from ternc.runtime.ops.linears import given
from ternc.runtime.ops.token_linears import BITS, check_token_linears, joined

_Tensors = list[torch.Tensor]

WIDEST = 8192
"""Columns that every program normalises for itself; more would leave no registers for weights."""


def token_linears(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    activation: str,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    layouts: list[int],
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """x [..., K] -> y_i [..., N_i], or h [..., N]; one launch for one token."""
    norm = (gain, shift, kind, eps, gain_offset, round_first)
    lists = (weights, scales, multipliers, biases, out_features, group_sizes)
    check_token_linears(x, *norm, activation, *lists, layouts)
    columns = x.shape[-1]
    packed = all_packed(weights, scales, multipliers, out_features, columns, group_sizes, layouts)
    some = [None if given(bias) is None else bias.contiguous() for bias in biases]
    if x.numel() != columns or not _one_launch(packed, some, columns):
        return _one_by_one(x, norm, activation, lists, layouts)
    counts = out_features[:1] if activation else out_features
    outputs = tuple(x.new_empty((*x.shape[:-1], rows)) for rows in counts)
    before = None
    if kind:
        gain, shift = (None if t is None else t.contiguous() for t in (gain, shift))
        before = Norm(kind, eps, gain, shift, gain_offset, round_first)
    product = Product(
        weights=tuple(packed),
        biases=tuple(b for b in some if b is not None) or None,
        outputs=tuple(y.view(1, -1) for y in outputs),
    )
    gated, alone = (activation, "") if len(packed) == 2 else ("", activation)
    kernel = select.GATED if gated else select.GEMV
    config = select.gemv_config(product.joint, x.device, kernel)
    linear_gemv(x.reshape(1, columns).contiguous(), None, product, config, before, gated, alone)
    for each in packed:
        dispatch.record(each.bytes, "triton_gemv")
    return outputs[0] if len(outputs) == 1 else outputs


def _one_launch(packed: list[Weight], biases: list[torch.Tensor | None], columns: int) -> bool:
    """Whether one launch of the one-token kernel takes all weights."""
    return (
        0 < columns <= WIDEST
        and all(weight.rows for weight in packed)
        and len(alike(packed, biases)) == 1
        and packed[0].layout != linear_int8.LAYOUT
        and not packed[0].free_scales
        and not select.unsupported(packed[0])
        and not select.gemv_unsupported(packed[0], BITS)
    )


def _one_by_one(
    x: torch.Tensor,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, str, float, float, bool],
    activation: str,
    lists: tuple[_Tensors, _Tensors, _Tensors, _Tensors, list[int], list[int]],
    layouts: list[int],
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The same as the separate ops' kernels."""
    q, sx = x, None
    if norm[2]:
        _, q, sx = norm_quantize(x, *norm, None, 0, BITS, False)
    return joined(linears(q, sx, *lists, BITS, layouts, x.dtype), activation)
