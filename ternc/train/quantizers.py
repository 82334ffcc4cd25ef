"""A weight -> the codes and scales of its final quantiser, of ternc::fit or of mean |W|: what
inference packs. `formats/blend.py` has the wider formats of a schedule.
"""

from __future__ import annotations

import torch

from ternc.config import CODE_MAX, MAX_MULTIPLIED_CODE, Config
from ternc.formats.fit import fit as fit_quantized
from ternc.formats.quantized import Quantized, expand_groups, group_count
from ternc.formats.scales import round_to_storage


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
