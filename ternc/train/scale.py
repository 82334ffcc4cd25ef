"""`LearntScale`: scales that start at least squares and are trained (LSQ, arXiv 1902.08153).

    W_q[n, k] = s[n] m[n, k // g] c[n, k],   s = s0 f,   c = clip(rint(W / (s m)), -cmax, cmax)

s0 and m are the fit of the weight at the start; f, one factor a row, is the Parameter: it starts at
1, so that the optimiser's step is relative to the scale. For networks that were trained already.
"""

from __future__ import annotations

import torch
from torch import nn

from ternc.config import CODE_MAX
from ternc.formats.quantized import Quantized, expand_groups
from ternc.formats.scales import round_to_storage
from ternc.train.sharding import full

SMALLEST_FACTOR = 1e-3


class LearntScale(nn.Module):
    """The scales of one weight [N, K].

    Attributes:
        factor: Parameter [N], or [1] of a weight with one scale.
        start: fp32, as factor.
        multiplier: uint8 [N, G]; None without groups.
    """

    factor: nn.Parameter
    start: torch.Tensor
    multiplier: torch.Tensor | None

    def __init__(self, fitted: Quantized) -> None:
        super().__init__()
        self.planes, self.group_size = fitted.planes, fitted.group_size
        self.factor = nn.Parameter(torch.ones_like(fitted.scale))
        self.register_buffer("start", fitted.scale.clone())
        self.register_buffer("multiplier", fitted.multiplier)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """w [N, K] -> its quantised values, straight through to w; to the factor as LSQ has it.

        d W_q / d f = (W_q - W) / f inside the range of codes and W_q / f outside, times
        1 / sqrt(K cmax).
        """
        given, factor = w.detach(), self._factor()
        quantized = self.quantized(given)
        values = quantized.dequantize().to(w.dtype)
        most, step = CODE_MAX[self.planes], self._step(quantized.scale, w.shape[1])
        inside = given.abs() < (most + 0.5) * step
        slope = (values - torch.where(inside, given, 0.0)) / factor.detach()[:, None]
        share = (w.shape[1] * most) ** -0.5
        # Both differences are exactly zero: they carry gradients alone.
        moved = share * (factor - factor.detach())[:, None] * slope
        return values + (w - given) + moved.to(w.dtype)

    @torch.no_grad()
    def quantized(self, w: torch.Tensor) -> Quantized:
        """w [N, K] -> codes at the scales of now, as they are stored."""
        scale = round_to_storage(self.start * self._factor().detach())
        step, most = self._step(scale, w.shape[1]), CODE_MAX[self.planes]
        codes = torch.where(step > 0, w.float() / step, 0.0).round().clamp(-most, most)
        return Quantized(codes.to(torch.int8), scale, self.multiplier, self.group_size, self.planes)

    def _factor(self) -> torch.Tensor:
        return full(self.factor).clamp(min=SMALLEST_FACTOR)

    def _step(self, scale: torch.Tensor, columns: int) -> torch.Tensor:
        """fp32 [N or 1, K or 1]."""
        if self.multiplier is None:
            return scale[:, None]
        return expand_groups(scale[:, None] * self.multiplier, self.group_size, columns)
