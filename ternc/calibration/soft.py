"""`SoftLayer`: a packed layer whose codes are being trained, W = s m T(u; sharpness).

T is a staircase of sigmoids over the codes. It starts soft and sharpens until it is the rounding
of u. u starts at W / (s m) of the float weight, held within the cell of the code that was fitted:
there T is nearly that code, and a code that the float weight disagrees with is the first to change.

After Wang et al., "CAT-Q" (2026), without its low-rank term; Nagel et al., "AdaRound" (2020).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ternc.config import CODE_MAX
from ternc.formats.packed import pack, unpack
from ternc.formats.quantized import expand_groups
from ternc.formats.scales import round_to_storage
from ternc.modules.conversion import float_weight
from ternc.modules.linear import TernaryLinear

SOFTEST, SHARPEST = 15.0, 100.0
"""Sharpness of the staircase at the start, and when it is taken for the rounding. From 4 on, or
with a margin of 0.02, a 0.9 M byte model ended worse than it began."""

MARGIN = 0.2
"""Distance of a latent from the border of its cell at the start, in codes."""


def sharpness_at(share: float) -> float | None:
    """Sharpness after a share of the soft steps; None from 1 on, where codes are hard."""
    return SOFTEST * (SHARPEST / SOFTEST) ** share if share < 1 else None


class SoftLayer:
    """A packed layer whose codes are being trained: stands in for its forward meanwhile."""

    def __init__(self, layer: TernaryLinear, name: str, original: nn.Module) -> None:
        self.name = name
        self.sharpness: float | None = None
        self._layer, self._quantized = layer, unpack(layer.packed)
        self._cmax = CODE_MAX[layer.planes]
        w = float_weight(original).float()
        w = w.t() if layer.transposed else w
        if layer.rotation is not None:
            w = layer.rotation.rotate(w.contiguous())
        self.scale = nn.Parameter(self._quantized.scale.clone())
        codes = self._quantized.codes.float()
        step = self._step()
        wish = torch.where(step == 0, 0.0, w / step)
        reach = 0.5 - MARGIN
        self.latent = nn.Parameter(torch.minimum(torch.maximum(wish, codes - reach), codes + reach))

    def enter(self) -> None:
        self._layer.forward = self._forward  # type: ignore[method-assign]

    def leave(self) -> None:
        """Puts the hard codes and the stored form of the scales into the layer."""
        del self._layer.forward
        quantized = dataclasses.replace(
            self._quantized,
            codes=self._hard().to(torch.int8),
            scale=round_to_storage(self.scale.detach().clamp(min=0)),
        )
        packed = pack(quantized, self.scale.device.type)
        self._layer.packed_weight, self._layer.scale = packed.weight, packed.scale

    def _step(self) -> torch.Tensor:
        """s m, fp32 [N, 1] or [N, K]."""
        quantized, columns = self._quantized, self._layer.in_features
        if quantized.multiplier is not None:
            steps = self.scale[:, None] * quantized.multiplier
            return expand_groups(steps, quantized.group_size, columns)
        if self.scale.dim() == 2:
            return expand_groups(self.scale, quantized.group_size, columns)
        return self.scale[:, None]

    def _hard(self) -> torch.Tensor:
        return self.latent.detach().round().clamp(-self._cmax, self._cmax)

    def _forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.sharpness is None:
            codes = self._hard()
        else:
            codes = Staircase.apply(self.latent, self.sharpness, self._cmax)
        w = self._step() * codes
        if self._layer.rotation is not None:
            w = self._layer.rotation.restore(w)
        bias = self._layer.bias
        added = None if bias is None else bias.to(input.dtype)
        return F.linear(input, w.to(input.dtype), added)


class Staircase(torch.autograd.Function):
    """u -> sum over the borders b between codes of sigmoid(sharpness (u - b)), less the codes < 0.

    One tensor of the size of u is kept for the gradient, whatever the number of codes.
    """

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, sharpness: float, cmax: int) -> torch.Tensor:
        total, slope = torch.full_like(u, -cmax), torch.zeros_like(u)
        for lower in range(-cmax, cmax):
            part = (sharpness * (u - (lower + 0.5))).sigmoid_()
            total += part
            slope.addcmul_(part, 1 - part, value=sharpness)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None
