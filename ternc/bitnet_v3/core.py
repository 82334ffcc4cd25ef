"""Quantisers and transforms as functions: weights, per-token activations, H x."""

from __future__ import annotations

import torch

from ternc.errors import ConfigError
from ternc.formats.blend import four_levels, uniform
from ternc.formats.rotation import MAX_BLOCK
from ternc.runtime import ops
from ternc.train.quantizers import ternary


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> x blockdiag(H_b) / sqrt(b), b the largest power of two in K, at most 4096.

    Orthogonal and its own inverse for every K; differentiable.
    """
    ops.register()
    columns = x.shape[-1]
    return torch.ops.ternc.hadamard(x, None, min(columns & -columns, MAX_BLOCK))


def quantize_weights(w: torch.Tensor, bits: float = 1.58, method: str = "absmean") -> torch.Tensor:
    """w [N, K] -> its values at 1.58, 2, 4, 8 or 16 bits, gradient straight through.

    Args:
        method: scales of 1.58 bits: "absmean" (one for the tensor) or "fit" (least squares a row).

    Raises:
        ConfigError: other bits.
    """
    ops.register()
    given = w.detach()
    if bits >= 16:
        return w
    if 1 < bits < 2:
        made = ternary(given, 1, -1 if method == "absmean" else 0, _scale(method))
        values = made.dequantize().to(w.dtype)
    elif bits == 2:
        values = four_levels(given)
    elif bits in (4, 8):
        values = uniform(given, int(bits))
    else:
        raise ConfigError(f"bits={bits!r} is not 1.58, 2, 4, 8 or 16")
    return values + (w - given)


def quantize_activations(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """x [..., K] -> its per-token values at 8 or 4 bits (16: x), gradient straight through."""
    ops.register()
    return x if bits >= 16 else torch.ops.ternc.fake_quantize_act(x, bits)


def _scale(method: str) -> str:
    if method not in ("absmean", "fit"):
        raise ConfigError(f"method={method!r} is not 'absmean' or 'fit'")
    return method
