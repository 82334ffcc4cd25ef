"""A model of the right structure + a manifest -> the same model with empty packed modules in place.

`load_state_dict` then brings the weights: nothing is fitted, and the float weights are not read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ternc.errors import CheckpointError
from ternc.manifest import Manifest, PackedModule
from ternc.modules.attention import (
    TernaryMultiheadAttention,
    separate_float_projections,
    split_projections,
)
from ternc.modules.conversion import carry_over, is_attention
from ternc.modules.embedding import TernaryEmbedding
from ternc.modules.linear import TernaryLinear


def install(model: nn.Module, manifest: Manifest, source: Path) -> nn.Module:
    """Puts packed modules, still without weights, into the places that the manifest names.

    Args:
        model: of the saved structure, float or packed; changed in place.
        source: the file of the manifest, for messages.

    Returns:
        The root, which is a new module where the root itself is packed.

    Raises:
        CheckpointError: a module is missing, or has another kind or size.
    """
    for path, _ in packed_layers(model):
        if path not in manifest.modules:
            raise CheckpointError(
                f"{source}: module {path!r} is packed in the model, but floating point "
                "in the folder; load into a float model"
            )
    made: dict[nn.Module, nn.Module] = {}  # keyed by the module: it must not die and be mistaken
    for path in manifest.attention:
        module = _submodule(model, path, source)
        if is_attention(module) and module not in made:
            projections = _projections(module, path, manifest, source)
            made[module] = TernaryMultiheadAttention.from_attention(module, projections)
            carry_over(module, made[module])
        model = _put(model, path, made.get(module, module))
    for path, packed in manifest.modules.items():
        module = _submodule(model, path, source)
        if module not in made:
            made[module] = _empty(module, path, packed, source)
        model = _put(model, path, made[module])
    return model


def _projections(
    attention: nn.MultiheadAttention, path: str, manifest: Manifest, source: Path
) -> dict[str, nn.Module]:
    projections: dict[str, nn.Module] = {}
    for part, linear in split_projections(attention).items():
        name = f"{path}.{part}" if path else part
        packed = manifest.modules.get(name)
        projections[part] = _empty(linear, name, packed, source) if packed else linear
    separate_float_projections(projections)
    return projections


def _submodule(model: nn.Module, path: str, source: Path) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"{source}: the model has no module {path!r}; load the folder into a model "
            "of the class and size that was saved"
        ) from error


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Sets the module at `path`; returns the root, which is `module` itself where path is ""."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
    return model


def _empty(module: nn.Module, path: str, packed: PackedModule, source: Path) -> TernaryLinear:
    """The packed layer without its weight, of the shape that `module` must have."""
    if isinstance(module, TernaryLinear):
        shape, device = (module.out_features, module.in_features), module.packed_weight.device
    else:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise CheckpointError(
                f"{source}: module {path!r} is a {type(module).__name__}, neither a linear nor an "
                "embedding"
            )
        rows, columns = weight.shape
        shape = (columns, rows) if packed.transposed else (rows, columns)
        device = weight.device
    bias = getattr(module, "bias", None)
    if shape != packed.shape or (bias is not None and not packed.bias):
        raise CheckpointError(
            f"{source}: module {path!r} is {list(packed.shape)}, bias={packed.bias}; "
            f"in the model it is {list(shape)}, bias={bias is not None}"
        )
    if bias is None and packed.bias:  # calibration or training gave the layer one
        bias = torch.empty(packed.shape[0], dtype=packed.dtype, device=device)
    embeds = isinstance(module, nn.Embedding | TernaryEmbedding)
    layer = (TernaryEmbedding if embeds else TernaryLinear).empty(
        packed.shape,
        bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach()),
        config=packed.config,
        group_size=packed.group_size,
        planes=packed.planes,
        weight_dtype=packed.dtype,
        transposed=packed.transposed,
        device=torch.device("cpu") if device.type == "meta" else device,
    )
    carry_over(module, layer)
    return layer


def packed_layers(model: nn.Module) -> list[tuple[str, TernaryLinear]]:
    """Every packed linear by module path; a shared one under each of its paths."""
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TernaryLinear)
    ]
