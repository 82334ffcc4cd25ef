"""Packed model -> its weights by their own names: `Quantized` where packed, else tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ternc.errors import UnsupportedModelError
from ternc.formats.packed import unpack
from ternc.formats.quantized import Quantized
from ternc.modules.linear import TernaryLinear


def packed_layers(model: nn.Module, target: str) -> dict[str, TernaryLinear]:
    """Every packed layer by name, tied ones under each of their names.

    Raises:
        UnsupportedModelError: a layer rotates its input, which no other program does.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TernaryLinear)
    }
    for name, module in found.items():
        if module.rotation is not None:
            raise UnsupportedModelError(
                f"{name}: its weight is rotated and its input has to be, which {target} does not "
                "know; quantize with rotation='none'"
            )
    return found


def weights(
    model: nn.Module, layers: dict[str, TernaryLinear]
) -> Iterator[tuple[str, Quantized | torch.Tensor]]:
    """Name of a float model's state_dict, and its weight; [out_features, in_features] if packed.

    A transposed layer (`TernaryLinear.transposed`) is given as [out_features, in_features] too.
    """
    for name, layer in layers.items():
        yield f"{name}.weight", unpack(layer.packed)
        if layer.bias is not None:
            yield f"{name}.bias", layer.bias.detach()
    inside = tuple(f"{name}." for name in layers)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            yield name, tensor.detach()
