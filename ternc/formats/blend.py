"""Weights and activations -> the values of one bit-width, or of a blend of two. Closed forms only.

    16 bits   W                                                   (floating point)
    8, 4      s q, q = clip(rint(W / s)), s = max|W| / (2**(b-1) - 1) per row
    2         s (h + 1/2), h = clip(floor(W / s), -2, 1), s of least squares per row
    1.58      given: the values of the codes that inference packs

A state is fp32 [3]: source bits, target bits, blend; W_t = (1 - blend) Q_source + blend Q_target.
No gradient is defined here: callers pass theirs straight through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FLOAT = 16.0
"""Bits of the stage that quantises nothing; 32 means the same."""

TERNARY = 1.58
"""Bits of the final quantiser, whatever its plane count."""

WEIGHT_BITS = (FLOAT, 8.0, 4.0, 2.0, TERNARY)
ACTIVATION_BITS = (FLOAT, 8.0, 4.0)

GAUSSIAN_STEP = 0.9957
"""Step, in standard deviations, of the best uniform 4-level quantiser of a Gaussian (Max 1960)."""

LLOYD_ROUNDS = 4


def uniform(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w [N, K] -> symmetric `bits`-bit values, bits >= 3, one scale a row (absolute maximum)."""
    most = 2 ** (bits - 1) - 1
    scale = w.abs().amax(-1, keepdim=True) / most
    codes = (w / scale).round().clamp(-most - 1, most)
    return torch.where(scale > 0, codes * scale, 0.0).to(w.dtype)


def four_levels(w: torch.Tensor) -> torch.Tensor:
    """w [N, K] -> values in s {-1.5, -0.5, 0.5, 1.5}, s of least squares per row.

    Absolute-maximum scaling would waste both outer levels (relative error 0.87 on Gaussian rows;
    this has 0.345), and two bits would be worse than ternary.
    """
    scale = GAUSSIAN_STEP * w.square().mean(-1, keepdim=True).sqrt()
    for _ in range(LLOYD_ROUNDS):
        levels = _half_steps(w, scale)
        refit = (w * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        scale = torch.where(scale > 0, refit, scale)
    return torch.where(scale > 0, _half_steps(w, scale) * scale, 0.0).to(w.dtype)


def _half_steps(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, w / scale, 0.0).floor().clamp(-2, 1) + 0.5


def values_of(w: torch.Tensor, bits: float) -> torch.Tensor:
    """w [N, K] -> its values at 16, 8, 4 or 2 bits."""
    if bits == FLOAT:
        return w
    return four_levels(w) if bits == 2 else uniform(w, int(bits))


def values_by_bits(
    w: torch.Tensor, formats: tuple[float, ...], final: torch.Tensor | None
) -> dict[float, torch.Tensor]:
    """w [N, K] -> its values in every format of a schedule; `final` are those of 1.58 bits."""
    return {
        bits: final if bits == TERNARY and final is not None else values_of(w, bits)
        for bits in formats
    }


def blended(values: dict[float, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
    """The blend that `state` (fp32 [3]: source bits, target bits, blend) asks for.

    Nothing is read on the host: a schedule moves without recompilation and without waiting for
    the device. A blend of 0 or 1 gives one of the two exactly.
    """
    source, target = _chosen(values, state[0]), _chosen(values, state[1])
    return torch.lerp(source, target, state[2].to(source.dtype))


def _chosen(values: dict[float, torch.Tensor], bits: torch.Tensor) -> torch.Tensor:
    formats = list(values)
    chosen = values[formats[-1]]
    for candidate in formats[:-1]:
        chosen = torch.where((bits - candidate).abs() < 1e-3, values[candidate], chosen)
    return chosen


def blend(
    formats: list[float], state: torch.Tensor, quantizer: Callable[[float], torch.Tensor]
) -> torch.Tensor:
    """The blend of two of `formats` that `state` asks for.

    A state in the memory of the host is read there, and no other quantiser is computed; one on
    a device never is, so that nothing waits for it.
    """
    if state.device.type != "cpu":
        return blended({bits: quantizer(bits) for bits in formats}, state)
    source, target, share = asked(formats, state)
    if source == target or share == 1.0:
        return quantizer(target)
    return torch.lerp(quantizer(source), quantizer(target), share)


def asked(formats: list[float], state: torch.Tensor) -> tuple[float, float, float]:
    """The nearest two of `formats` and the blend that `state` asks for; waits for its device."""
    source, target, share = state.tolist()
    return _nearest(formats, source), _nearest(formats, target), share


def _nearest(formats: list[float], bits: float) -> float:
    return min(formats, key=lambda candidate: abs(candidate - bits))
