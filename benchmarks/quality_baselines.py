"""Other ways to make a weight ternary, as float weights: what ternc's results stand beside.

    greedy      k residual planes, threshold max|w| / 2, scale max|w|, per row
    absmean     one plane, round(w / mean|w|) clipped to +-1, groups of 128 (BitNet b1.58's rule)
    integer     b bits between the least and the largest weight of each group of 128
    reference   joint least squares over k free plane scales per group of 128, block Hadamard
                rotation, GPTQ error compensation; nothing after the codes
    gptq        the integer grid with GPTQ error compensation, not rotated
    torchao     that package's integers of 3 or 4 bits, symmetric, groups of 128; it compensates
                errors on GPUs alone

None is part of the product. Error compensation is written apart from ternc's own fits, and shares
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
from ternc.calibration.moments import SplitMoments
from ternc.config import Config
from ternc.formats.rotation import Rotation
from ternc.policy import excluded
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


def integer(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w [N, K] rounded to integers of `bits` bits, a scale and a zero point for every group."""
    return torch.cat([_nearest(part, _integers(part, bits)) for part in w.split(GROUP, 1)], 1)


def replace_weights(model: nn.Module, rule: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Every quantised Linear's weight replaced by `rule` of it, in place."""
    for module in linears(model).values():
        module.weight.data = rule(module.weight.data)
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What every method quantises: the Linears that ternc's default does not leave out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not excluded(name, Config())
    }


Levels = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(group of weights [N, L], metric [L]) -> levels [N, ...] that its weights may take."""


def reference_stack(model: nn.Module, batches: Sequence[Any], planes: int) -> nn.Module:
    """The reference stack in the place of every Linear's weight, in place."""
    return _compensated(model, batches, lambda w, metric: _levels(w, metric, planes), rotate=True)


def gptq(model: nn.Module, batches: Sequence[Any], bits: int) -> nn.Module:
    """Integers of `bits` bits, errors compensated, in the place of every Linear's weight."""
    return _compensated(model, batches, lambda w, _: _integers(w, bits), rotate=False)


def torchao(model: nn.Module, bits: int, algorithm: str) -> nn.Module:
    """torchao's weights of `bits` bits in the place of every Linear's weight, in place.

    Args:
        algorithm: how it chooses scales, "affine" or "hqq_scale_only".
    """
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layers = set(linears(model).values())
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(GROUP),
        intx_choose_qparams_algorithm=algorithm,
    )
    quantize_(model, config, filter_fn=lambda module, _: module in layers)
    for layer in layers:  # the values that it computes with, as a plain tensor
        layer.weight = nn.Parameter(layer.weight.dequantize().detach(), requires_grad=False)
    return model


def at_bits(points: Sequence[tuple[float, float]], bits: float) -> float:
    """Error at `bits` on the line in log error through two points (bits, error)."""
    (first, error), (second, other) = points
    return error * (other / error) ** ((bits - first) / (second - first))


def _compensated(
    model: nn.Module, batches: Sequence[Any], levels: Levels, rotate: bool
) -> nn.Module:
    """Every Linear's weight replaced in the order of execution, in place."""
    ops.register()
    layers = linears(model)
    with evaluating(model):
        execution = record(model, layers, batches[0])
        activations = Activations(model, batches, execution)
        for group in execution.groups:
            split = activations.moments(group[0], layers[group[0]])
            assert isinstance(split, SplitMoments), f"{group[0]}: {split.reason}"
            count = split.fitted.count + split.held_out.count
            share = split.fitted.count / count
            hessian = share * split.fitted.second + (1 - share) * split.held_out.second
            rotation = Rotation.of(len(hessian), seed=0)
            if rotate:
                half = rotation.rotate(hessian)
                hessian = rotation.rotate(half.T.contiguous())
            factor = _factor(hessian, 0.01 if count >= 8 * len(hessian) else 0.1)
            for name in group:
                weight = layers[name].weight
                q = _gptq(rotation.rotate(weight.data) if rotate else weight.data, factor, levels)
                weight.data = rotation.restore(q) if rotate else q
    return model


def _factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    ridge = damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double() + ridge))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _gptq(w: torch.Tensor, factor: torch.Tensor, levels: Levels) -> torch.Tensor:
    columns = len(factor)
    w, q = w.clone(), torch.empty_like(w)
    pivots = factor.diagonal().tolist()
    for first in range(0, columns, GROUP):
        last = min(first + GROUP, columns)
        allowed = levels(w[:, first:last], factor.diagonal()[first:last] ** -2)
        errors = w.new_empty(len(w), last - first)
        for j in range(first, last):
            q[:, j] = _nearest(w[:, j, None], allowed).squeeze(1)
            error = (w[:, j] - q[:, j]) / pivots[j]
            w[:, j + 1 : last] -= error[:, None] * factor[j, j + 1 : last]
            errors[:, j - first] = error
        w[:, last:] -= errors @ factor[first:last, last:]
    return q


def _nearest(w: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """w [N, L] snapped to the nearest of levels [N, V] of its row."""
    chosen = (w[..., None] - levels[:, None]).abs().argmin(2)
    return levels.gather(1, chosen)


def _integers(w: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels [N, 2^bits] of a group w [N, L]: scale * (integer - zero point), 0 among them."""
    top = 2**bits - 1
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).clamp(min=1e-12).half().float().clamp(min=1e-7)
    zero = (-low / scale).round().clamp(0, top)
    return scale * (torch.arange(top + 1, device=w.device) - zero)


def _levels(w: torch.Tensor, metric: torch.Tensor, planes: int) -> torch.Tensor:
    """Levels [N, 3^k] of the joint least-squares fit of a group w [N, L], from two starts."""
    trits = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=planes)), device=w.device)
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
    return [first, first[:, :1] * 3.0 ** -torch.arange(planes, device=w.device)]


def _alternate(
    w: torch.Tensor, metric: torch.Tensor, scales: torch.Tensor, trits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, k] and weighted squared error [N] after `ALS_ROUNDS` rounds."""
    ridge = 1e-6 * torch.eye(scales.shape[1], device=w.device)
    for _ in range(ALS_ROUNDS):
        chosen = trits[(w[..., None] - (scales @ trits.T)[:, None]).abs().argmin(2)]
        normal = torch.einsum("nlk,l,nlm->nkm", chosen, metric, chosen)
        right = torch.einsum("nlk,l,nl->nk", chosen, metric, w)
        size = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-12)
        scales = torch.linalg.solve(normal + size * ridge, right)
    levels = scales @ trits.T
    error = (w[..., None] - levels[:, None]).abs().amin(2).square() @ metric
    return scales, error
