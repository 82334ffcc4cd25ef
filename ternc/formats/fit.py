"""The policy for float weights: w [N, K], Config -> fewest planes within the error, or why not.

Uses the op ternc::fit, so `ternc.runtime.ops.register()` must have run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.config import CODE_MAX, MAX_IN_FEATURES, Config
from ternc.formats import planewise
from ternc.formats.planewise_fit import fit_scales, nearest
from ternc.formats.quantized import Quantized, Refusal, group_count, is_finite
from ternc.formats.scales import round_to_storage

REFINE_ROUNDS = 8
"""Rounds of alternating least squares for method "als"; live weights take the closed form (0)."""

SAMPLED_ROWS = 32

CLEARLY_OVER = 1.15
"""A sampled error this many times over the budget rules a plane count out without a full fit."""

_WORDS = {1: "one plane reaches", 2: "two planes reach", 3: "three planes reach"}


def choose(w: torch.Tensor, config: Config, refine: int = 0) -> Quantized | Refusal:
    """w [N, K], any float dtype -> codes and scales as `config` asks, or the reason to keep w.

    config.planes 1 to 3 is obeyed; "auto" takes the fewest planes whose relative error
    ||w - W|| / ||w|| is within config.error_budget, and refuses where three are not enough.
    `refine` is the number of rounds of alternating least squares.
    """
    w = w.detach()
    if refusal := refuse(w, config):
        return refusal
    if config.planes != "auto":
        return fit(w, config.planes, config, refine)
    budget = config.error_budget
    rows = torch.linspace(0, len(w) - 1, min(SAMPLED_ROWS, len(w))).round().long()
    sample = w[rows.to(w.device)]
    for planes in CODE_MAX:
        if planes < max(CODE_MAX) and len(w) > len(sample):
            estimate = fit(sample, planes, config, 0).relative_error(sample)
            if estimate > CLEARLY_OVER * budget:
                continue
        quantized = fit(w, planes, config, refine)
        error = quantized.relative_error(w)
        if error <= budget:
            return quantized
    return over_budget(planes, "relative error", error, budget)


def refuse(w: torch.Tensor, config: Config | None = None) -> Refusal | None:
    """Why no fit takes w at all, or None where one does.

    Args:
        config: where the weight is to become planes, which free scales make wider.
    """
    if w.dim() != 2 or not w.is_floating_point() or not w.numel():
        return Refusal(f"the weight is {w.dtype} {list(w.shape)}, not a floating-point matrix")
    if w.shape[1] > MAX_IN_FEATURES:
        return Refusal(
            f"in_features={w.shape[1]:,} is over {MAX_IN_FEATURES:,}, the last for which integer "
            "sums fit 32 bits"
        )
    if config is not None and not config.tie_scales and 0 < config.fit_group < w.shape[1]:
        planes = max(CODE_MAX) if config.planes == "auto" else config.planes
        wide = planewise.width(w.shape[1], planes, config.fit_group)
        if wide > MAX_IN_FEATURES:
            return Refusal(
                f"{planes} planes of {w.shape[1]:,} columns with free scales stand in {wide:,}, "
                f"over {MAX_IN_FEATURES:,}"
            )
    if not is_finite(w):
        return Refusal(f"{int((~w.isfinite()).sum()):,} elements are not finite")
    return None


def over_budget(planes: int, what: str, error: float, budget: float) -> Refusal:
    """The refusal of a weight whose best fit, with `planes` planes, has an error over the budget.

    Args:
        what: the error that is meant, "relative error" or one of outputs.
    """
    return Refusal(f"{_WORDS[planes]} a {what} of {error:.3g} > error_budget {budget:.3g}")


def fit(w: torch.Tensor, planes: int, config: Config, refine: int) -> Quantized:
    """w [N, K], finite -> `planes` planes with tied or, if config says so, free scales."""
    group = config.fit_group
    if group >= w.shape[1]:
        group = 0  # one group a row is a row scale
    if group > 0 and not config.tie_scales:
        return _fit_free(w, planes, group, refine)
    codes, scale, multiplier = torch.ops.ternc.fit(w, planes, group, refine)
    return Quantized(
        codes=codes,
        scale=scale,
        multiplier=multiplier if group > 0 else None,
        group_size=max(group, 0),
        planes=planes,
    )


def _fit_free(w: torch.Tensor, planes: int, group: int, refine: int) -> Quantized:
    """Every group fitted as a row of its own: scale [N, G] or [N, G, P], no multiplier."""
    rows, columns = w.shape
    groups = group_count(columns, group)
    units = F.pad(w, (0, groups * group - columns)).view(-1, group)
    codes, scale, _ = torch.ops.ternc.fit(units, planes, 0, refine)
    if planes > 1:
        scale = round_to_storage(fit_scales(units.float(), scale, planes, refine, None))
        codes = nearest(units.float(), scale).to(torch.int8)
    return Quantized(
        codes=codes.view(rows, -1)[:, :columns].contiguous(),
        scale=scale.view(rows, groups) if planes == 1 else scale.view(rows, groups, planes),
        multiplier=None,
        group_size=group,
        planes=planes,
    )
