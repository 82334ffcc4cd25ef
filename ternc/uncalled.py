"""Packed layers that a call of the model does not reach -> a sentence in their report rows.

A caller that reads the weight itself would never notice that the layer was replaced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import arguments
from ternc.modules.linear import TernaryLinear
from ternc.reporting import Row


def mark_uncalled(model: nn.Module, example_inputs: Any, rows: Sequence[Row]) -> None:
    """Runs the model once and says of every packed layer that was not called that it was not."""
    called: set[str] = set()
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TernaryLinear)
    }
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        names[layer].append(name)
    handles = [
        layer.register_forward_hook(lambda layer, *_: called.update(names[layer]))
        for layer in names
    ]
    modes = [(module, module.training) for module in model.modules()]
    args, kwargs = arguments(example_inputs)
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    for row in rows:
        if row.name in layers and row.name not in called:
            row.reason += (
                "; not called on the example inputs: its caller may read the weight itself"
            )
