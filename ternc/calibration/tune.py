"""Scales, norms and biases of a quantised model <- trained against the float model. Codes stay.

    min over (s, norm weights, biases) of mean over batches of loss(quantised(batch), float(batch))

One batch in eight is not trained on: where the loss there has not fallen, everything is put back.
Chen et al., "EfficientQAT" (2024), its end-to-end step, with a distillation loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import call, evaluating, held_out
from ternc.calibration.distance import Loss
from ternc.errors import ConfigError
from ternc.formats.scales import round_to_storage
from ternc.modules.linear import TernaryLinear
from ternc.progress import track


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    Raises:
        ConfigError: a value is not allowed.
    """

    epochs: int = 4
    """Times that the calibration batches are gone through."""
    rate: float = 5e-3
    """Adam's step in units of each tensor's root mean square; falls to zero along a cosine."""
    seed: int = 0
    """Order of the batches."""

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ConfigError(f"epochs={self.epochs!r} is not a positive int")
        if not 0.0 < float(self.rate) < 1.0:
            raise ConfigError(f"rate={self.rate!r} is not between 0 and 1")


@torch.inference_mode(mode=False)
def tune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    tuning: Tuning,
    progress: bool | None = None,
) -> tuple[float, float]:
    """Trains `model` in place, in eval mode, unless that does not help.

    Every scale is rounded to its stored form at the end, so that saving loses nothing.

    Returns:
        The mean loss on batches not trained on (of a single batch, on it), before and after. Where
        the second is not less than the first, the model is what it was.
    """
    count = len(batches)
    judged = [b for i, b in enumerate(batches) if held_out(i, count)] or list(batches)
    before = mean_loss(model, teacher, judged, loss)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    used = [b for i, b in enumerate(batches) if not held_out(i, count)]
    _train(model, teacher, used, loss, tuning, progress)
    after = mean_loss(model, teacher, judged, loss)
    if not after < before:
        model.load_state_dict(state)
    return before, after


@torch.no_grad()
def mean_loss(model: nn.Module, teacher: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    """Mean over batches of the distance between the models' outputs."""
    with evaluating(teacher), evaluating(model):
        losses = [float(loss(call(model, b), call(teacher, b), b)) for b in batches]
    return sum(losses) / len(losses)


def _train(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    tuning: Tuning,
    progress: bool | None,
) -> None:
    layers = list(dict.fromkeys(m for m in model.modules() if isinstance(m, TernaryLinear)))
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    total = tuning.epochs * len(batches)
    generator = torch.Generator().manual_seed(tuning.seed)
    model.requires_grad_(False)
    owners: dict[int, TernaryLinear] = {}
    for layer in layers:
        owner = owners.setdefault(id(layer.packed_weight), layer)
        layer.scale_requires_grad_()
        layer.scale = owner.scale  # a tied weight has one scale
    trained = list(_trained(model, layers))
    for parameter in trained:
        parameter.requires_grad_()
    optimiser = torch.optim.Adam([{"params": [p], "lr": unit_of(p)} for p in trained])
    units = [group["lr"] for group in optimiser.param_groups]
    try:
        with evaluating(teacher), evaluating(model), torch.enable_grad():
            for step in track(range(total), total, "tune", progress):
                if step % len(batches) == 0:
                    order = torch.randperm(len(batches), generator=generator).tolist()
                batch = batches[order[step % len(batches)]]
                for group, unit in zip(optimiser.param_groups, units, strict=True):
                    group["lr"] = tuning.rate * unit * (1 + math.cos(math.pi * step / total)) / 2
                with torch.no_grad():
                    target = call(teacher, batch)
                value = loss(call(model, batch), target, batch)
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
    finally:
        _settle(model, layers, wanted)


def _trained(model: nn.Module, layers: Sequence[TernaryLinear]) -> Iterator[nn.Parameter]:
    """Scales of packed layers, biases, and every other Parameter of one dimension (norms)."""
    scales = {id(layer.scale) for layer in layers}  # free ones have two dimensions
    for parameter in model.parameters():
        if id(parameter) in scales or (parameter.dim() == 1 and parameter.is_floating_point()):
            yield parameter


def unit_of(parameter: torch.Tensor) -> float:
    """Root mean square, at least 1e-3 and for all-zero tensors 1e-2: the size a step is part of."""
    size = float(parameter.detach().float().square().mean().sqrt())
    return max(size, 1e-3) if size else 1e-2


def _settle(model: nn.Module, layers: list[TernaryLinear], wanted: dict[str, bool]) -> None:
    """Scales become stored numbers and buffers again; requires_grad is what it was."""
    stored: dict[int, torch.Tensor] = {}
    for layer in layers:
        key = id(layer.packed_weight)
        if key not in stored:
            stored[key] = round_to_storage(layer.scale.detach().clamp(min=0))
        layer.scale_requires_grad_(False)
        layer.scale = stored[key]
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(wanted.get(name, False))
