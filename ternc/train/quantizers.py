"""Weights and activations -> the values of one bit-width, or of a blend of two. Closed forms only.

    16 bits   W                                                   (floating point)
    8, 4      s q, q = clip(rint(W / s)), s = max|W| / (2**(b-1) - 1) per row
    2         s (h + 1/2), h = clip(floor(W / s), -2, 1), s of least squares per row
    1.58      s m c of ternc::fit (or of mean |W|): the codes that inference packs

No gradient is defined here: callers add `w - w.detach()`, which is exactly zero.
"""

from __future__ import annotations

import torch

from ternc.config import CODE_MAX, MAX_MULTIPLIED_CODE, Config
from ternc.formats.fit import fit as fit_quantized
from ternc.formats.quantized import Quantized, expand_groups, group_count
from ternc.formats.scales import round_to_storage
from ternc.train.schedule import FLOAT, TERNARY

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


def ternary(w: torch.Tensor, planes: int, group_size: int, scale: str) -> Quantized:
    """w [N, K] -> the codes and scales that inference packs.

    Args:
        group_size: columns of a group, 0 = row, -1 = tensor.
        scale: "fit" (least squares, ternc::fit) or "absmean" (BitNet b1.58, arXiv 2402.17764).
    """
    w = w.detach()
    if scale == "absmean":
        return _absmean(w.float(), group_size)
    config = Config(planes=planes, group_size=_GROUPS.get(group_size, group_size))  # type: ignore[arg-type]
    return fit_quantized(w, planes, config, 0)


_GROUPS = {0: None, -1: "tensor"}


def _absmean(w: torch.Tensor, group_size: int) -> Quantized:
    """codes = clip(rint(W / mean|W|), +-1); group means are rounded to multiples of the row's."""
    rows, columns = w.shape
    multiplier = None
    if group_size <= 0:
        scale = w.abs().mean().view(1) if group_size < 0 else w.abs().mean(1)
        scale = round_to_storage(scale)
        step = scale[:, None]
    else:
        groups = group_count(columns, group_size)
        padded = torch.nn.functional.pad(w.abs(), (0, groups * group_size - columns))
        count = torch.full((groups,), float(group_size), device=w.device)
        count[-1] = columns - (groups - 1) * group_size
        means = padded.view(rows, groups, group_size).sum(-1) / count
        scale = round_to_storage(means.amax(1) / MAX_MULTIPLIED_CODE)
        quotient = torch.where(scale[:, None] > 0, means / scale[:, None], 0.0)
        steps = quotient.round().clamp(1, MAX_MULTIPLIED_CODE)
        multiplier = torch.where(means > 0, steps, 0.0).to(torch.uint8)
        step = expand_groups(scale[:, None] * multiplier, group_size, columns)
    codes = torch.where(step > 0, w / step, 0.0).round().clamp(-CODE_MAX[1], CODE_MAX[1])
    return Quantized(codes.to(torch.int8), scale, multiplier, max(group_size, 0), 1)


def values_by_bits(
    w: torch.Tensor, formats: tuple[float, ...], final: torch.Tensor | None
) -> dict[float, torch.Tensor]:
    """w [N, K] -> its values in every format of a schedule; `final` are those of 1.58 bits."""
    found: dict[float, torch.Tensor] = {}
    for bits in formats:
        if bits == TERNARY and final is not None:
            found[bits] = final
        elif bits == FLOAT:
            found[bits] = w
        else:
            found[bits] = four_levels(w) if bits == 2 else uniform(w, int(bits))
    return found


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
