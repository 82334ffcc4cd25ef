"""Reference products, activation quantiser, and decompositions of W into k ternary planes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from ternc.config import CODE_MAX, Config
from ternc.errors import ConfigError, WeightShapeError
from ternc.formats.fit import fit
from ternc.formats.quantized import Quantized, is_finite
from ternc.runtime import ops

MOST_TIED = 3
"""Planes of one balanced ternary code; more are fitted to what is left."""

ALS_ROUNDS = 8
ALS_MOST = 4
"""Planes whose 3**k levels are searched exactly."""

ROWS = 64
"""Rows that ALS assigns at a time."""


def bitlinear_python(
    x: torch.Tensor,
    W: torch.Tensor,
    gamma: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in], trits W [out, in], gamma [out] or [1, out] -> (x W^T) gamma + bias."""
    y = F.linear(x, W.to(x.dtype)) * gamma.reshape(-1).to(x.dtype)
    return y if bias is None else y + bias


def multi_ternary_linear_python(
    x: torch.Tensor,
    W_ternary: torch.Tensor,
    gammas: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in], planes [k, out, in], gammas [k, out] -> sum_j (x T_j^T) gammas_j + bias."""
    y = sum(bitlinear_python(x, t, g) for t, g in zip(W_ternary, gammas, strict=True))
    assert isinstance(y, torch.Tensor)
    return y if bias is None else y + bias


def activation_quant(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """x [..., in] -> its per-token `bits`-bit values (8 or 4), straight-through gradient."""
    ops.register()
    return torch.ops.ternc.fake_quantize_act(x, bits)


def greedy_ternary_decomposition(
    W: torch.Tensor,
    k: int,
    method: str = "balanced",
) -> tuple[torch.Tensor, torch.Tensor]:
    """W [out, in] ~ sum_j gammas[j, :, None] W_ternary[j]; both in the dtype of W.

    Args:
        k: planes, 1 or more. The error never grows with k.
        method: "balanced" (planes of one code in base 3, one scale a row), "greedy" (each plane
            fits what is left, then all scales of the row by least squares) or "als" (alternating
            assignment of all 3**k levels and least squares, k <= 4).

    Returns:
        (W_ternary [k, out, in] in {-1, 0, 1}, gammas [k, out]).

    Raises:
        ConfigError: another method, or k out of its range.
        WeightShapeError: W is no finite matrix.
    """
    if W.dim() != 2 or not W.is_floating_point() or not W.numel() or not is_finite(W):
        raise WeightShapeError(
            f"greedy_ternary_decomposition: W is {W.dtype} {list(W.shape)}; a finite matrix of "
            "floating-point numbers is wanted"
        )
    if method not in _METHODS or not 1 <= k <= (ALS_MOST if method == "als" else 64):
        raise ConfigError(
            f"method={method!r}, k={k}: methods are {', '.join(_METHODS)}; k is 1 or more, at most "
            f"{ALS_MOST} for 'als'"
        )
    ops.register()
    with torch.no_grad():
        planes, gammas = _METHODS[method](W.float(), k)
    return planes.to(W.dtype), gammas.to(W.dtype)


def balanced_parts(w: torch.Tensor, k: int) -> list[Quantized]:
    """w fp32 [N, K] -> codes of up to three planes each, each fitting what those before leave."""
    parts: list[Quantized] = []
    config = Config(planes=1, group_size=None)
    while k > 0:
        planes = min(k, MOST_TIED)
        quantized = fit(w, planes, config, 0)
        parts.append(quantized)
        w = w - quantized.dequantize()
        k -= planes
    return parts


def trit_planes(codes: torch.Tensor, planes: int) -> torch.Tensor:
    """Codes [N, K] -> trits [planes, N, K], most significant first, in fp32."""
    rest, found = codes.float(), []
    for p in reversed(range(planes)):
        reach = CODE_MAX[p] if p else 0
        digit = torch.where(rest > reach, 1.0, torch.where(rest < -reach, -1.0, 0.0))
        found.append(digit)
        rest = rest - digit * 3**p
    return torch.stack(found)


def _balanced(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    planes, gammas = [], []
    for part in balanced_parts(w, k):
        planes.append(trit_planes(part.codes, part.planes))
        steps = torch.tensor([3.0**p for p in reversed(range(part.planes))], device=w.device)
        gammas.append(steps[:, None] * part.scale.expand(len(w)))
    return torch.cat(planes), torch.cat(gammas)


def _greedy(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    planes = w.new_empty((0, *w.shape))
    gammas = w.new_empty((0, len(w)))
    for _ in range(k):
        left = w - (gammas[..., None] * planes).sum(0)
        codes, _, _ = torch.ops.ternc.fit(left, 1, 0, 0)
        planes = torch.cat((planes, codes.float()[None]))
        gammas = _least_squares(w, planes)
    return planes, gammas


def _als(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = min((_balanced(w, k), _greedy(w, k)), key=lambda found: float(_error(w, *found).sum()))
    planes, gammas = best
    gammas = _least_squares(w, planes)
    error = _error(w, planes, gammas)
    choices = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=k)), device=w.device)
    for _ in range(ALS_ROUNDS):
        new = torch.cat(
            [
                choices[(rows[..., None] - (g.T @ choices.T)[:, None]).abs().argmin(-1)]
                for rows, g in zip(w.split(ROWS), gammas.split(ROWS, 1), strict=True)
            ]
        ).permute(2, 0, 1)
        scales = _least_squares(w, new)
        found = _error(w, new, scales)
        wins = found < error
        planes = torch.where(wins[None, :, None], new, planes)
        gammas = torch.where(wins[None], scales, gammas)
        error = torch.minimum(found, error)
    return planes, gammas


def _least_squares(w: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """argmin over gammas [k, N] of ||w - sum_j gammas_j T_j||, row by row; 0 for empty planes."""
    rows = planes.permute(1, 0, 2).double()  # [N, k, K]
    gram = rows @ rows.transpose(1, 2)
    ridge = torch.eye(len(planes), dtype=gram.dtype, device=w.device) * 1e-9
    right = (rows @ w.double()[..., None]).squeeze(-1)
    return torch.linalg.solve(gram + ridge, right).T.float()


def _error(w: torch.Tensor, planes: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
    """Squared error of every row."""
    return (w - (gammas[..., None] * planes).sum(0)).square().sum(1)


_METHODS = {"balanced": _balanced, "greedy": _greedy, "als": _als}
