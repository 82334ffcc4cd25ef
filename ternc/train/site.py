"""The trainable sites of a model, and their state: what losses, regularisers and logs use.

One list for all of them: the layers that `prepare` found with the rules of `ternc.quantize`, or, in
a float model, the weights that the graphs of the backend train.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from ternc.errors import TrainingError
from ternc.formats.blend import FLOAT, TERNARY
from ternc.inspection import trained_weights
from ternc.runtime.dynamo import uncompiled
from ternc.train.graph_layer import GraphLayer
from ternc.train.linear import QATLinear
from ternc.train.schedule import BlendState


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that is trained as a ternary one."""

    name: str
    """Module path; of a shared module or weight, the first one."""
    weight: nn.Parameter
    """The master weight, as the module holds it."""
    layer: QATLinear | GraphLayer

    @property
    def module(self) -> QATLinear:
        """The layer of a prepared model.

        Raises:
            TrainingError: the weight is trained by a compiled graph alone.
        """
        if isinstance(self.layer, QATLinear):
            return self.layer
        raise TrainingError(
            f"{self.name}: a compiled graph trains this weight, no layer does; "
            "ternc.train.prepare(model) makes the layers"
        )

    @property
    def quantizer(self) -> str:
        """The current quantiser in words: "1.58", or "8 -> 4 (0.31)". Waits for the device."""
        return self.layer.quantizer

    def set_schedule(self, weights: BlendState, activations: BlendState | None = None) -> None:
        """Moves the schedule, in place: nothing is compiled anew."""
        self.layer.set_schedule(weights, activations)

    def values(self) -> torch.Tensor:
        """Q(W) of the current quantiser in the layout of `weight`, without gradient; where a graph
        reads a part of `weight` or turns it, the values of what it reads.
        """
        values = self.layer.values()
        return values.t() if self.layer.transposed else values


def sites(model: nn.Module) -> list[Site]:
    """The sites of a model, one a weight: those of `ternc.train.prepare` in the order of the model.

    A model without any, compiled with backend="ternc" and called with gradients, has those of its
    graphs. A compiled model, and one wrapped for several processes, has the sites of the model
    inside.
    """
    seen: set[int] = set()
    found = []
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, QATLinear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found.append(Site(name, module.weight, module))
    return found or [
        Site(trained.name, parameter, GraphLayer(parameter, trained))
        for parameter, trained in trained_weights(model)
    ]


def layers(model: nn.Module) -> list[QATLinear]:
    """Every trainable layer, those of shared weights included."""
    return [module for module in unwrap(model).modules() if isinstance(module, QATLinear)]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside `torch.compile` and DistributedDataParallel."""
    while True:
        inner = uncompiled(model)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is model:
            return model
        model = inner


@contextlib.contextmanager
def final_quantizers(model: nn.Module) -> Iterator[None]:
    """Inside, every site uses its final quantiser: the model that could be packed now."""
    held = [
        (layer, layer.weight_state.clone(), _clone(layer.activation_state))
        for layer in layers(model)
    ]
    try:
        for layer, _, _ in held:
            layer.set_schedule(*final_states(layer))
        yield
    finally:
        with torch.no_grad():
            for layer, weights, activations in held:
                layer.weight_state.copy_(weights)
                if layer.activation_state is not None and activations is not None:
                    layer.activation_state.copy_(activations)


def final_states(layer: QATLinear) -> tuple[BlendState, BlendState]:
    """States of weight and input at the end of every schedule."""
    bits = float(layer.settings.activation_bits or FLOAT)
    return BlendState(TERNARY, TERNARY, 1.0), BlendState(bits, bits, 1.0)


def _clone(state: torch.Tensor | None) -> torch.Tensor | None:
    return None if state is None else state.clone()
