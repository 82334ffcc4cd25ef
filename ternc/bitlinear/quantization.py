"""Weight matrix -> trits and scales: one plane, by least squares, mean or largest magnitude."""

from __future__ import annotations

import torch

from ternc.errors import ConfigError
from ternc.runtime import ops
from ternc.train.quantizers import ternary

SMALLEST = 1e-5


def absmax_scale(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """max|tensor|, at least 1e-5: of everything, or along `dim`, which is kept with size 1.

    A row of W [out, in] is an output channel: its scale is that of dim=1.
    """
    magnitude = tensor.abs()
    largest = magnitude.amax() if dim is None else magnitude.amax(dim, keepdim=True)
    return largest.clamp(min=SMALLEST)


def ternary_quantize(tensor: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Trits in {-1, 0, 1}, in the dtype of `tensor`: clip(round(tensor / scale)).

    Without a scale the least-squares one is used, of the whole tensor. `scale=absmax_scale(w)`
    gives the threshold max|w| / 2, which zeroes 94 % of Gaussian weights.
    """
    if scale is None:
        ops.register()
        units = tensor.detach().float().reshape(1, -1)
        codes, _, _ = torch.ops.ternc.fit(units, 1, -1, 0)
        return codes.view(tensor.shape).to(tensor.dtype)
    return (tensor / scale).round().clamp(-1, 1)


def weight_to_ternary(
    W: torch.Tensor,
    per_channel: bool = True,
    method: str = "least_squares",
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [out, in] ~ gamma[:, None] W_ternary -> (W_ternary in {-1, 0, 1}, gamma [out]).

    Args:
        per_channel: a scale for every row; else one for all, repeated.
        method: "least_squares" (the smallest error there is for ternary weights), "absmean" (BitNet
            b1.58) or "absmax" (threshold max|w| / 2 and scale max|w|).

    Raises:
        ConfigError: another method.
    """
    ops.register()
    if method == "absmax":
        gamma = absmax_scale(W, 1 if per_channel else None).reshape(-1)
        trits = ternary_quantize(W, gamma[:, None] if per_channel else gamma)
    elif method in ("least_squares", "absmean"):
        scale = "fit" if method == "least_squares" else "absmean"
        quantized = ternary(W, 1, 0 if per_channel else -1, scale)
        trits, gamma = quantized.codes.to(W.dtype), quantized.scale.to(W.dtype)
    else:
        raise ConfigError(f"method={method!r} is not 'least_squares', 'absmean' or 'absmax'")
    return trits, gamma.expand(len(W)).contiguous()
