"""Packed model -> a folder that transformers loads as a BitNet checkpoint, two bits a weight.

<layer>.weight        uint8 [N / 4, K]: byte n holds rows n, N/4 + n, N/2 + n, 3N/4 + n,
                      from the lowest two bits up, as trit + 1
<layer>.weight_scale  [1]: W = trit * scale ("autobitlinear"), or trit / scale ("bitlinear",
                      for layers with a bias, which the other multiplies by the scale)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import UnsupportedModelError, WeightShapeError
from ternc.export.weights import packed_layers, weights
from ternc.formats.quantized import Quantized
from ternc.modules.embedding import TernaryEmbedding
from ternc.modules.linear import TernaryLinear

ROWS_A_BYTE = 4
TARGET = "the BitNet checkpoint"
AGAIN = "quantize with planes=1, group_size='tensor'"


def write(model: nn.Module, path: Path) -> dict[str, Any]:
    """Writes config.json and model.safetensors into the folder `path`.

    Raises:
        UnsupportedModelError: no transformers model, or a layer that is no Linear there.
        WeightShapeError: a weight that is not one plane with one scale, or whose rows do not fill
        bytes.
    """
    from safetensors.torch import save_file

    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config of transformers, which {TARGET} needs"
        )
    layers = packed_layers(model, TARGET)
    _check_layers(layers)
    divides = any(layer.bias is not None for layer in layers.values())
    dtype = _dtype(model, layers, divides)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    tied = tied if getattr(config, "tie_word_embeddings", False) else set()
    tensors: dict[str, torch.Tensor] = {}
    for name, value in weights(model, layers):
        if isinstance(value, Quantized):
            scale = value.scale[:1]
            tensors[name] = pack_rows(_one_plane(name, value).codes)
            tensors[f"{name}_scale"] = (1 / scale if divides else scale).to(dtype)
        elif name not in tied:
            tensors[name] = value.to(dtype) if value.is_floating_point() else value
    floats = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    ]
    path.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    linear_class = "bitlinear" if divides else "autobitlinear"
    written = {
        **json.loads(config.to_json_string(use_diff=False)),
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": linear_class,
            "quantization_mode": "offline",
            "modules_to_not_convert": floats,
        },
    }
    (path / "config.json").write_text(json.dumps(written, indent=1) + "\n")
    size = sum(file.stat().st_size for file in path.iterdir())
    return {"bytes": size, "layers": len(layers), "linear_class": linear_class, "dtype": str(dtype)}


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] in -1, 0, 1 -> uint8 [N / 4, K]; N is a multiple of 4."""
    digits = (codes + 1).to(torch.uint8).view(ROWS_A_BYTE, -1, codes.shape[1])
    shifts = torch.arange(0, 2 * ROWS_A_BYTE, 2, dtype=torch.uint8, device=codes.device)
    return (digits << shifts[:, None, None]).sum(0, dtype=torch.uint8)


def _check_layers(layers: dict[str, TernaryLinear]) -> None:
    for name, layer in layers.items():
        embeds = isinstance(layer, TernaryEmbedding)
        if embeds or layer.transposed:
            kind = "an embedding" if embeds else "a layer that holds its weight transposed"
            raise UnsupportedModelError(
                f"{name} is {kind}, and {TARGET} packs nn.Linear alone; leave it out with exclude="
            )


def _one_plane(name: str, value: Quantized) -> Quantized:
    """The weight, if the layout holds it.

    Raises:
        WeightShapeError: it does not.
    """
    rows = value.shape[0]
    multiplied = value.multiplier is not None and bool((value.multiplier != 1).any())
    if value.planes != 1 or multiplied or bool((value.scale != value.scale.flatten()[0]).any()):
        raise WeightShapeError(
            f"{name} is {value.describe()}, and {TARGET} holds one plane with one scale a weight; "
            f"{AGAIN}"
        )
    if rows % ROWS_A_BYTE:
        raise WeightShapeError(
            f"{name}: has {rows} rows, and {TARGET} packs {ROWS_A_BYTE} of them in a byte; leave "
            "the layer out with exclude="
        )
    return value


def _dtype(model: nn.Module, layers: dict[str, TernaryLinear], divides: bool) -> torch.dtype:
    """The model's own where it holds every scale exactly; else fp32, in which all is exact."""
    own = next((p.dtype for p in model.parameters()), torch.float32)
    scales = torch.cat([layer.scale.detach().flatten() for layer in layers.values()])
    scales = 1 / scales if divides else scales
    return own if torch.equal(scales.to(own).float(), scales) else torch.float32
