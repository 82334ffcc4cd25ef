"""The trainable sites of a prepared model, and their state: what losses, regularisers and logs use.

One list for all of them: the layers that `prepare` found with the rules of `ternc.quantize`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from ternc.train.linear import QATLinear
from ternc.train.schedule import FLOAT, TERNARY, BlendState


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight that is trained as a ternary one."""

    name: str
    """Module path; of a shared module or weight, the first one."""
    weight: nn.Parameter
    """The master weight, as the module holds it."""
    module: QATLinear

    @property
    def quantizer(self) -> str:
        """The current quantiser in words: "1.58", or "8 -> 4 (0.31)". Waits for the device."""
        return self.module.quantizer

    def values(self) -> torch.Tensor:
        """Q(W) of the current quantiser in the layout of `weight`, without gradient."""
        values = self.module.values()
        return values.t() if self.module.transposed else values


def sites(model: nn.Module) -> list[Site]:
    """The sites of a model from `ternc.train.prepare`, one a weight, in the order of the model.

    A compiled model, and one wrapped for several processes, has the sites of the model inside.
    """
    seen: set[int] = set()
    found = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, QATLinear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found.append(Site(name, module.weight, module))
    return found


def layers(model: nn.Module) -> list[QATLinear]:
    """Every trainable layer, those of shared weights included."""
    return [module for module in unwrap(model).modules() if isinstance(module, QATLinear)]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside `torch.compile` and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
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
