"""Other ways to make a weight ternary, as float weights: what ternc's results stand beside.

    greedy      k residual planes, threshold max|w| / 2, scale max|w|, per row
    absmean     one plane, round(w / mean|w|) clipped to +-1, groups of 128 (BitNet b1.58's rule)
    reference   joint least squares over k free plane scales per group of 128, block Hadamard
                rotation, GPTQ error compensation; nothing after the codes

None is part of the product. The reference stack is written apart from ternc's own fits, and shares
with them only the collection of activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ternc.calibration.activations import Activations
from ternc.calibration.batches import evaluating
from ternc.calibration.execution import record
from ternc.formats.rotation import Rotation
from ternc.runtime import ops

GROUP = 128
ALS_ROUNDS = 12


def greedy(w: torch.Tensor, planes: int) -> torch.Tensor:
    """w [N, K] as `planes` planes, each taking what the planes before it left."""
    left, total = w.clone(), torch.zeros_like(w)
    for _ in range(planes):
        scale = left.abs().amax(1, keepdim=True)
        plane = scale * left.sign() * (left.abs() > scale / 2)
        left, total = left - plane, total + plane
    return total


def absmean(w: torch.Tensor, planes: int) -> torch.Tensor:
    """w [N, K] as one plane; `planes` must be 1."""
    assert planes == 1
    parts = []
    for group in w.split(GROUP, 1):
        scale = group.abs().mean(1, keepdim=True).clamp(min=1e-8)
        parts.append(scale * (group / scale).round().clamp(-1, 1))
    return torch.cat(parts, 1)


def replace_weights(model: nn.Module, rule: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Every Linear's weight replaced by `rule` of it, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rule(module.weight.data)
    return model


def reference_stack(model: nn.Module, batches: Sequence[Any], planes: int) -> nn.Module:
    """Every Linear's weight replaced in the order of execution, in place."""
    ops.register()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with evaluating(model):
        execution = record(model, layers, batches[0])
        activations = Activations(model, batches, execution)
        for group in execution.groups:
            split = activations.moments(group[0], layers[group[0]])
            count = split.fitted.count + split.held_out.count
            share = split.fitted.count / count
            hessian = share * split.fitted.second + (1 - share) * split.held_out.second
            rotation = Rotation.of(len(hessian), seed=0)
            half = rotation.rotate(hessian)
            hessian = rotation.rotate(half.T.contiguous())
            for name in group:
                w = rotation.rotate(layers[name].weight.data)
                q = _gptq(w, hessian, planes, 0.01 if count >= 8 * len(hessian) else 0.1)
                layers[name].weight.data = rotation.restore(q)
    return model


def _gptq(w: torch.Tensor, hessian: torch.Tensor, planes: int, damping: float) -> torch.Tensor:
    columns = len(hessian)
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    w, q = w.clone(), torch.empty_like(w)
    for first in range(0, columns, GROUP):
        last = min(first + GROUP, columns)
        levels = _levels(w[:, first:last], factor.diagonal()[first:last] ** -2, planes)
        errors = torch.empty(len(w), last - first)
        for j in range(first, last):
            nearest = (w[:, j, None] - levels).abs().argmin(1, keepdim=True)
            q[:, j] = levels.gather(1, nearest).squeeze(1)
            error = (w[:, j] - q[:, j]) / factor[j, j]
            w[:, j + 1 : last] -= error[:, None] * factor[j, j + 1 : last]
            errors[:, j - first] = error
        w[:, last:] -= errors @ factor[first:last, last:]
    return q


def _levels(w: torch.Tensor, metric: torch.Tensor, planes: int) -> torch.Tensor:
    """Levels [N, 3^k] of the joint least-squares fit of a group w [N, L], from two starts."""
    trits = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=planes)))
    fits = [_alternate(w, metric, start, trits) for start in _starts(w, planes)]
    better = fits[0][1] <= fits[1][1]
    scales = torch.where(better[:, None], fits[0][0], fits[1][0])
    return scales @ trits.T


def _starts(w: torch.Tensor, planes: int) -> list[torch.Tensor]:
    """Plane scales [N, k]: of the greedy residual with threshold 0.75 mean, and a ladder of 3."""
    left, scales = w.clone(), []
    for _ in range(planes):
        plane = left.sign() * (left.abs() > 0.75 * left.abs().mean(1, keepdim=True))
        scale = (left * plane).sum(1) / plane.abs().sum(1).clamp(min=1)
        left = left - scale[:, None] * plane
        scales.append(scale)
    first = torch.stack(scales, 1)
    return [first, first[:, :1] * 3.0 ** -torch.arange(planes)]


def _alternate(
    w: torch.Tensor, metric: torch.Tensor, scales: torch.Tensor, trits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, k] and weighted squared error [N] after `ALS_ROUNDS` rounds."""
    ridge = 1e-6 * torch.eye(scales.shape[1])
    for _ in range(ALS_ROUNDS):
        chosen = trits[(w[..., None] - (scales @ trits.T)[:, None]).abs().argmin(2)]
        normal = torch.einsum("nlk,l,nlm->nkm", chosen, metric, chosen)
        right = torch.einsum("nlk,l,nl->nk", chosen, metric, w)
        size = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-12)
        scales = torch.linalg.solve(normal + size * ridge, right)
    levels = scales @ trits.T
    error = (w[..., None] - levels[:, None]).abs().amin(2).square() @ metric
    return scales, error
