"""fp32 scales <-> fp16 with one power-of-two exponent per tensor: scale = stored * 2**exponent.

The exponent puts the largest scale into [2**14, 2**15), so that fp16 keeps 11 significant bits of
every scale down to 2**-28 of the largest.
"""

from __future__ import annotations

import math

import torch

TOP_EXPONENT = 15
"""The largest stored scale is below 2**15; fp16 ends at 65,504."""


def round_to_storage(scale: torch.Tensor) -> torch.Tensor:
    """fp32 scales of any shape, rounded to fp16 times one power of two; fp32, no device sync."""
    if not scale.numel():
        return scale
    _, exponent = torch.frexp(scale.amax())
    # float64: the power of two of a very small scale is beyond fp32.
    shift = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - TOP_EXPONENT)
    stored = (scale.double() / shift).to(torch.float16)
    return (stored.double() * shift).float()


def scale_to_storage(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """fp32 scales -> (fp16, exponent) where that is lossless, else (the fp32 scales, 0)."""
    largest = float(scale.amax()) if scale.numel() else 0.0
    if not math.isfinite(largest):
        return scale, 0
    exponent = math.frexp(largest)[1] - TOP_EXPONENT
    # A largest scale that was rounded up to a power of two belongs to the exponent below.
    for candidate in (exponent, exponent - 1):
        stored = (scale.double() * 2.0**-candidate).to(torch.float16)
        if torch.equal(scale_from_storage(stored, candidate), scale):
            return stored, candidate
    return scale, 0


def scale_from_storage(stored: torch.Tensor, exponent: int) -> torch.Tensor:
    """Inverse of `scale_to_storage`: fp32 scales."""
    return (stored.double() * 2.0**exponent).float()
