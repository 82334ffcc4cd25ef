"""fit(w) -> codes, scale, multiplier: W ~ s[n] * m[n, k // g] * c[n, k] of least squared error.

1. Per group (row, tensor): the real step a of least error of a * clip(rint(w / a), +-cmax).
   One plane: exact (sort |w|, maximise (prefix sum)**2 / length, a = mean of the kept).
   Two and three planes: the best of `RATIOS` * max|w| / cmax, then two Lloyd rounds
   (a = sum(w c) / sum(c c), codes again).
2. Per row of groups: s = max(a) / t for every t of `TOP_MULTIPLIERS`, m the better of floor and
   ceil of a / s in [1, 127 // cmax] (0 for an all-zero group), codes again, s by least squares;
   the t of least error is kept.
3. `refine` rounds of alternating least squares over codes, m and s; the best is kept.
4. s rounded to fp16 times one power of two per tensor, codes a last time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ternc.config import CODE_MAX, MAX_IN_FEATURES, MAX_MULTIPLIED_CODE
from ternc.errors import KernelError, WeightShapeError
from ternc.formats.quantized import expand_groups, group_count, is_finite
from ternc.formats.scales import round_to_storage
from ternc.runtime.ops.definition import OpDefinition, refuse_gradient, unreachable_backward

RATIOS = tuple(0.3 * (1.05 / 0.3) ** (i / 13) for i in range(14))
"""Candidate steps in units of max|w| / cmax: Gaussian groups of 128 want 0.5 to 0.9."""

LLOYD_ROUNDS = 2

TOP_MULTIPLIERS = {1: (127,), 2: (31, 30, 29, 28, 27), 3: (9, 8, 7, 6, 5)}
"""Multiplier t given to the group of largest step, by planes."""

CHUNK = 1 << 20
"""Weights fitted at a time: bounds the temporaries to a few tens of MB."""

_Fit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(squared error [N], scale [N], multiplier [N, G]) of rows of groups."""


def check_fit(w: torch.Tensor, planes: int, group_size: int, refine: int) -> None:
    """Raise for what no kernel takes."""
    if w.dim() != 2 or not w.is_floating_point():
        raise WeightShapeError(
            f"ternc::fit: weight is {w.dtype} {list(w.shape)}, not a floating-point [N, K]"
        )
    if w.shape[1] == 0 or w.shape[0] == 0 or w.shape[1] > MAX_IN_FEATURES:
        raise WeightShapeError(
            f"ternc::fit: weight has shape {list(w.shape)}; in_features is 1 to {MAX_IN_FEATURES:,}"
        )
    if planes not in CODE_MAX or group_size < -1 or refine < 0:
        raise KernelError(
            f"ternc::fit: planes={planes} (1, 2, 3), group_size={group_size} (columns, 0 = row, "
            f"-1 = tensor), refine={refine} (0 or more)"
        )


def reference(
    w: torch.Tensor, planes: int, group_size: int, refine: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [N, K], finite, any float dtype -> codes int8 [N, K], scale fp32, multiplier uint8.

    group_size > 0: scale [N], multiplier [N, G], the last group possibly short. 0: scale [N],
    multiplier [N, 0]. -1: scale [1], multiplier [N, 0].
    """
    check_fit(w, planes, group_size, refine)
    if not is_finite(w):
        raise KernelError(
            f"ternc::fit: weight {list(w.shape)} holds NaN or infinity; repair or exclude it"
        )
    cmax, (rows, columns) = CODE_MAX[planes], w.shape
    if group_size == -1:
        units, unit = _in_units(w.reshape(1, -1).float())
        scale = refine_step(units, optimal_step(units, planes), cmax, refine) * unit
        multiplier = None
    else:
        scale, multiplier = fit_rows(w, planes, group_size, refine)
    scale = round_to_storage(scale)
    codes = w.new_empty((rows, columns), dtype=torch.int8)
    for start in range(0, rows, step_rows := max(1, CHUNK // columns)):
        part = slice(start, start + step_rows)
        step = scale[:, None] if group_size == -1 else scale[part, None]
        if multiplier is not None:
            step = expand_groups(step * multiplier[part], group_size, columns)
        codes[part] = snap(w[part].float(), step, cmax)
    if multiplier is None:
        multiplier = w.new_empty((rows, 0), dtype=torch.uint8)
    return codes, scale, multiplier.to(torch.uint8)


def fit_rows(
    w: torch.Tensor, planes: int, group_size: int, refine: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """w [N, K] -> scale fp32 [N] and multiplier fp32 [N, G], None for group_size 0; in chunks."""
    chunks = w.split(max(1, CHUNK // w.shape[1]))
    scales, multipliers = [], []
    for chunk in chunks:
        rows, unit = _in_units(chunk.float())
        scale, multiplier = _fit_rows(rows, planes, group_size, refine)
        scales.append(scale * unit)
        multipliers.append(multiplier)
    return torch.cat(scales), torch.cat(multipliers) if group_size else None


def _in_units(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w fp32 [U, L] -> w / unit with largest magnitudes near 1, and the unit [U], a power of two.

    Exact, and squares of very small or large weights stay within fp32.
    """
    exponent = torch.frexp(w.abs().amax(1)).exponent.clamp_(-120, 120)
    one = torch.ones_like(w[:, 0])
    return w * torch.ldexp(one, -exponent)[:, None], torch.ldexp(one, exponent)


def _fit_rows(
    w: torch.Tensor, planes: int, group_size: int, refine: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w fp32 [N, K] -> scale [N] and multiplier fp32 [N, G] (without meaning for group_size 0)."""
    cmax = CODE_MAX[planes]
    if not group_size:
        scale = refine_step(w, optimal_step(w, planes), cmax, refine)
        return scale, scale.new_empty((len(w), 0))
    groups = group_count(w.shape[1], group_size)
    # Padding with zeros adds no error: a zero weight has code zero.
    units = F.pad(w, (0, groups * group_size - w.shape[1])).view(-1, groups, group_size)
    steps = optimal_step(units.flatten(0, 1), planes).view(-1, groups)
    scales = [steps.amax(1) / torch.full_like(steps[:, 0], t) for t in TOP_MULTIPLIERS[planes]]
    trials = (
        _refit_scale(units, scale, _round_multiplier(units, scale, steps, cmax), cmax)
        for scale in scales
    )
    best = functools.reduce(_better, trials)
    for _ in range(refine):
        _, scale, multiplier = best
        best = _better(best, _alternate(units, scale, multiplier, cmax))
    return best[1], best[2]


def optimal_step(units: torch.Tensor, planes: int) -> torch.Tensor:
    """Real step a [U] of least squared error of a * clip(rint(w / a), +-cmax), w fp32 [U, L]."""
    magnitude = units.abs()
    if planes == 1:
        prefix = magnitude.sort(dim=1, descending=True).values.cumsum(1, dtype=torch.float64)
        length = torch.arange(1, units.shape[1] + 1, device=units.device, dtype=torch.float64)
        kept = (prefix * prefix / length).argmax(1, keepdim=True)
        return (prefix.gather(1, kept) / (kept + 1)).squeeze(1).float()
    cmax = CODE_MAX[planes]
    largest = magnitude.amax(1) / cmax
    step, error = largest, torch.full_like(largest, torch.inf)
    for ratio in RATIOS:
        candidate = largest * ratio
        codes = snap(magnitude, candidate[:, None], cmax)
        squares = (magnitude - candidate[:, None] * codes).square().sum(1)
        step = torch.where(squares < error, candidate, step)
        error = torch.minimum(squares, error)
    for _ in range(LLOYD_ROUNDS):
        step = _least_squares(magnitude, snap(magnitude, step[:, None], cmax), step)
    return step


def refine_step(w: torch.Tensor, step: torch.Tensor, cmax: int, rounds: int) -> torch.Tensor:
    """`rounds` of Lloyd's iteration on the steps [U] of w fp32 [U, L]; the error never grows."""
    for _ in range(rounds):
        step = _least_squares(w, snap(w, step[:, None], cmax), step)
    return step


def snap(w: torch.Tensor, step: torch.Tensor, cmax: int) -> torch.Tensor:
    """clip(rint(w / step), +-cmax) as fp32; 0 where the step is 0."""
    codes = (w / step).round_().clamp_(-cmax, cmax)
    return torch.where(step == 0, 0.0, codes)


def _least_squares(w: torch.Tensor, values: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """argmin over a of ||w - a * values||, last dimension; `default` where values are 0."""
    square = values.square().sum(-1)
    return torch.where(square > 0, (w * values).sum(-1) / square, default)


def _round_multiplier(
    units: torch.Tensor, scale: torch.Tensor, steps: torch.Tensor, cmax: int
) -> torch.Tensor:
    """steps / scale [N, G] -> the better of floor and ceil, from 1 to 127 // cmax; 0 for step 0."""
    quotient = torch.where(steps > 0, steps / scale[:, None], 0.0)
    most = MAX_MULTIPLIED_CODE // cmax
    choices = [quotient.floor().clamp(1, most), quotient.ceil().clamp(1, most)]
    errors = []
    for multiplier in choices:
        step = (scale[:, None] * multiplier)[..., None]
        errors.append((units - step * snap(units, step, cmax)).square().sum(-1))
    chosen = torch.where(errors[0] <= errors[1], choices[0], choices[1])
    return torch.where(steps > 0, chosen, 0.0)


def _refit_scale(
    units: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor, cmax: int
) -> _Fit:
    """The fit of the codes that s [N] and m [N, G] give, with s of least squares."""
    codes = snap(units, (scale[:, None] * multiplier)[..., None], cmax)
    values = codes.mul_(multiplier[..., None]).flatten(1)
    scale = _least_squares(units.flatten(1), values, scale)
    error = (units.flatten(1) - scale[:, None] * values).square().sum(1)
    return error, scale, multiplier


def _alternate(
    units: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor, cmax: int
) -> _Fit:
    """One round of alternating least squares: codes, then m, then codes and s."""
    steps = scale[:, None] * multiplier
    steps = _least_squares(units, snap(units, steps[..., None], cmax), steps)
    return _refit_scale(units, scale, _round_multiplier(units, scale, steps, cmax), cmax)


def _better(best: _Fit, new: _Fit) -> _Fit:
    """Row by row the fit of smaller error."""
    wins = new[0] < best[0]
    return (
        torch.where(wins, new[0], best[0]),
        torch.where(wins, new[1], best[1]),
        torch.where(wins[:, None], new[2], best[2]),
    )


def fake(
    w: torch.Tensor, planes: int, group_size: int, refine: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_fit(w, planes, group_size, refine)
    rows, columns = w.shape
    return (
        w.new_empty((rows, columns), dtype=torch.int8),
        w.new_empty((1 if group_size == -1 else rows,), dtype=torch.float32),
        w.new_empty((rows, group_count(columns, max(group_size, 0))), dtype=torch.uint8),
    )


FIT = OpDefinition(
    name="fit",
    schema="(Tensor w, int planes, int group_size, int refine) "
    "-> (Tensor codes, Tensor scale, Tensor multiplier)",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient("fit", "use ternc::fake_quantize, or pass w.detach()"),
    backward=unreachable_backward,
)
