"""Layers, budget of bits -> planes of each layer, by what each loses when it alone is quantised.

every layer starts with one plane; while the budget lasts, the layer whose next plane lowers the
measured loss most per bit gets it
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ternc.calibration.batches import call, evaluating
from ternc.calibration.calibrator import Layer
from ternc.calibration.distance import Loss
from ternc.calibration.execution import input_of
from ternc.calibration.prefix import Prefix
from ternc.config import CODE_MAX, Config
from ternc.errors import ConfigError, InputError
from ternc.formats import fit as data_free
from ternc.formats.layouts import at_rest_layout, get
from ternc.formats.quantized import frobenius, group_count
from ternc.formats.rotation import Rotation
from ternc.progress import track

MEASURED_BATCHES = 4
"""Batches on which a loss is measured: differences of layers are far larger than its noise."""

MEASURED_PLANES = (1, 2)
"""Plane counts whose loss is measured."""

SCALE_BITS = 16
MULTIPLIER_BITS = 8


@dataclasses.dataclass(frozen=True)
class Cost:
    """One layer at one plane count."""

    bits: float
    """At rest, scales included."""
    loss: float
    """Of the model with this layer alone quantised."""


def allocate(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Any],
    config: Config,
    loss: Loss,
    progress: bool | None,
) -> dict[str, int]:
    """Planes of every layer, within `config.bits_budget` bits a weight on the mean.

    Raises:
        ConfigError: the budget is below what one plane in every layer needs.
    """
    assert config.bits_budget is not None
    costs = measured_costs(model, layers, batches, config, loss, progress)
    count = {name: layer.weight().numel() for name, layer in layers.items()}
    return spend(costs, config.bits_budget * sum(count.values()))


def spend(costs: Mapping[str, Mapping[int, Cost]], budget: float) -> dict[str, int]:
    """Greedy: planes are bought where they lower the loss most per bit, while `budget` bits last.

    Two planes at once are a purchase too: the first of them may bring little.
    """
    planes = dict.fromkeys(costs, min(CODE_MAX))
    spent = sum(costs[name][count].bits for name, count in planes.items())
    if spent > budget:
        raise ConfigError(
            f"bits_budget is {budget / spent:.2f} of what one plane in every layer needs; raise it"
        )
    while True:
        offers = [
            ((costs[name][have].loss - costs[name][more].loss) / price, name, more, price)
            for name, have in planes.items()
            for more in CODE_MAX
            if more > have
            and (price := costs[name][more].bits - costs[name][have].bits)
            and spent + price <= budget
        ]
        if not offers or max(offers)[0] <= 0:
            return planes
        _, name, more, price = max(offers)
        planes[name] = more
        spent += price


def bits_at_rest(rows: int, columns: int, planes: int, config: Config) -> float:
    """Bits of a weight in a file: trits, scales and multipliers."""
    group = config.fit_group if 0 < config.fit_group < columns else 0
    groups = group_count(columns, group)
    scales = (
        rows * SCALE_BITS + rows * groups * MULTIPLIER_BITS
        if config.tie_scales or not group
        else rows * groups * planes * SCALE_BITS
    )
    return 8 * get(at_rest_layout(planes)).nbytes(rows, columns) + scales


@torch.no_grad()
def measured_costs(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Any],
    config: Config,
    loss: Loss,
    progress: bool | None,
) -> dict[str, dict[int, Cost]]:
    """Every layer at every plane count, by running the model with that layer alone quantised.

    The fit is the closed form, rotated where the configuration rotates: it ranks layers, and takes
    a moment. The model is run from the layer's block on; three planes are not run, but told from
    two by the errors of the weight. Kept meanwhile: the model's outputs on `MEASURED_BATCHES`
    batches, and what one block is given and gives on them.
    """
    step = max(1, len(batches) // MEASURED_BATCHES)
    measured = list(batches[::step][:MEASURED_BATCHES])
    costs: dict[str, dict[int, Cost]] = {}
    with evaluating(model):
        targets = [call(model, batch) for batch in measured]
        prefix = Prefix(model, {name: layer.module for name, layer in layers.items()}, measured)
        exact = _mean(loss(target, target, b) for target, b in zip(targets, measured, strict=True))
        if not math.isfinite(exact):
            raise InputError(
                f"bits_budget compares losses, and that of the float model on the calibration data "
                f"is {exact}: there is NaN or infinity in the data or in the model's outputs"
            )
        for name in track(prefix.order, len(layers), "allocate", progress):
            w, module = layers[name].weight().float(), layers[name].module
            quantised = {planes: _quantised(w, planes, config) for planes in CODE_MAX}
            losses = {}
            for planes in MEASURED_PLANES:
                hook = _computing(quantised[planes], layers[name].bias)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                try:
                    with prefix.skipping(module):
                        losses[planes] = _mean(
                            loss(call(model, batch), target, batch)
                            for batch, target in zip(measured, targets, strict=True)
                        )
                finally:
                    handle.remove()
            # Small errors cost by their square: what is left of it at three planes.
            two = frobenius(w - quantised[2])
            left = (frobenius(w - quantised[3]) / two) ** 2 if two else 0.0
            losses[3] = exact + (losses[2] - exact) * left
            costs[name] = {
                planes: Cost(bits_at_rest(w.shape[0], w.shape[1], planes, config), losses[planes])
                for planes in CODE_MAX
            }
    return costs


def _quantised(w: torch.Tensor, planes: int, config: Config) -> torch.Tensor:
    """w as the closed form of `planes` planes holds it."""
    if config.rotation == "none":
        return data_free.fit(w, planes, config, 0).dequantize()
    rotation = Rotation.of(w.shape[1], config.seed)
    return rotation.restore(data_free.fit(rotation.rotate(w), planes, config, 0).dequantize())


def _mean(values: Iterable[torch.Tensor]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def _computing(w: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A forward hook that puts x W^T + b in the place of a layer's output."""

    def compute(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        x = input_of(args, kwargs)
        return F.linear(x, w.to(x.dtype), bias)

    return compute
