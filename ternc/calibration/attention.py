"""nn.MultiheadAttention -> four projections that are modules, while a model is calibrated.

Its weights are read by one fused function; what each is given can only be seen once it is a module.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from ternc.config import Config
from ternc.modules.attention import (
    PROJECTIONS,
    TernaryMultiheadAttention,
    separate_float_projections,
    split_projections,
)
from ternc.modules.conversion import carry_over, is_attention, why_not
from ternc.modules.linear import TernaryLinear
from ternc.modules.ties import memory_key
from ternc.policy import excluded


@dataclasses.dataclass
class Expanded:
    """An attention module that stands for another for the time of the calibration."""

    original: nn.MultiheadAttention
    replacement: TernaryMultiheadAttention


def expand_attention(model: nn.Module, config: Config) -> tuple[nn.Module, list[Expanded]]:
    """Puts an equal module, its projections still floating point, in the place of each attention.

    Left alone: what is excluded by name, cannot be replaced, or shares its weights.
    Returns the root, a new one where it is an attention itself, and what was replaced.
    """
    owners: dict[object, int] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                owners[memory_key(tensor)] = owners.get(memory_key(tensor), 0) + 1
    found: dict[nn.Module, Expanded] = {}
    for path, module in model.named_modules():
        if is_attention(module) and not excluded(path, config) and not why_not(module):
            weights = [p for p in module.parameters() if p.dim() == 2]
            if all(owners[memory_key(weight)] == 1 for weight in weights):
                projections: dict[str, nn.Module] = dict(split_projections(module))
                replacement = TernaryMultiheadAttention.from_attention(module, projections)
                carry_over(module, replacement)
                found[module] = Expanded(module, replacement)
    return _replaced(model, {old: new.replacement for old, new in found.items()}), list(
        found.values()
    )


def settle_attention(model: nn.Module, expanded: list[Expanded]) -> nn.Module:
    """Puts the original back where no projection was packed; else frees its stacked weight."""
    back: dict[nn.Module, nn.Module] = {}
    for attention in expanded:
        projections = {name: getattr(attention.replacement, name) for name in PROJECTIONS}
        for projection in projections.values():
            projection.train(attention.original.training)
        if any(isinstance(projection, TernaryLinear) for projection in projections.values()):
            separate_float_projections(projections)
        else:
            back[attention.replacement] = attention.original
    return _replaced(model, back)


def _replaced(model: nn.Module, modules: dict[nn.Module, nn.Module]) -> nn.Module:
    """Every key replaced by its value, wherever it is; returns the root."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in modules:
                parent._modules[name] = modules[child]
    return modules.get(model, model)
