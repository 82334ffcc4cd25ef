"""norm(x; g, b) W^T + c -> norm(x) (W g)^T + (c + b W^T): gains and biases move to the readers.

Part of the fold of a residual stream, whose norms must have no gain; alone where a stream is
refused: channels that a gain makes large are outliers of every input that is quantised, and a
rotation mixes weights badly whose columns are as much smaller.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from ternc.formats.turn import Turn
from ternc.passes.context import Context
from ternc.passes.folds.fold import BIASES, NORMS, Edit, Product, why_fixed
from ternc.passes.norm_pattern import Norm
from ternc.passes.rule import Skip

_LARGEST_QUOTIENT = 64.0
"""Of a norm's bias by its gain, where the bias has to stay in the norm."""


def absorb(norm: Norm, products: list[Product], turn: Turn, context: Context) -> list[Edit] | Skip:
    """The gain of a norm goes into the products that read it; its bias too, where all have one.

    (n g + b) W^T + c = n' (W g Q)^T + (c + b W^T),  n' = n Q
    without c in one of them:  n' + (b / g) Q  in front of  (W g Q)^T
    """
    for parameter in (norm.gain, norm.bias):
        if parameter is not None and (reason := why_fixed(parameter, context)):
            return Skip(reason)
    gain = _value(norm.gain, context)
    edits = []
    if norm.gain is not None and gain is not None:
        gain = gain + norm.gain_offset
        ones = partial(torch.full_like, fill_value=1.0 - norm.gain_offset)
        edits.append(Edit(norm.gain, NORMS, ones))
    edits += [product.edit_inputs(partial(_scaled, gain=gain, turn=turn)) for product in products]
    shift = _value(norm.bias, context)
    if norm.bias is None or shift is None:
        return edits
    if all(product.bias is not None for product in products):
        edits.append(Edit(norm.bias, NORMS, torch.zeros_like))
        return edits + [_shifted(product, shift, context) for product in products]
    quotient = shift if gain is None else shift / gain
    quotient = torch.where(shift == 0, 0.0, quotient)
    if not quotient.abs().max() <= _LARGEST_QUOTIENT:
        return Skip("its gain is too small to divide its bias by, and a reader has no bias")
    return [*edits, Edit(norm.bias, NORMS, lambda old: turn(quotient).to(old.dtype))]


def _scaled(rows: torch.Tensor, gain: torch.Tensor | None, turn: Turn) -> torch.Tensor:
    """W [N, K] -> W g Q."""
    scaled = rows.float() if gain is None else rows.float() * gain
    return turn(scaled).to(rows.dtype)


def _shifted(product: Product, shift: torch.Tensor, context: Context) -> Edit:
    """c -> c + b W^T, before W changes."""
    assert product.bias is not None
    weight = context.inputs[product.weight.meta["ternc_position"]].detach()
    rows = weight.t() if product.transposed else weight

    def change(bias: torch.Tensor) -> torch.Tensor:
        return (bias.float() + rows.float() @ shift).to(bias.dtype)

    return Edit(product.bias, BIASES, change)


def _value(parameter: fx.Node | None, context: Context) -> torch.Tensor | None:
    """fp32 copy of a parameter as it is now."""
    if parameter is None:
        return None
    return context.inputs[parameter.meta["ternc_position"]].detach().float().clone()
