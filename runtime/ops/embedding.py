"""embedding(indices, packed weight) -> rows of W: scale * multiplier * codes."""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.formats.quantized import Quantized
from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize
from ternc.runtime.ops.definition import (
    FLOAT_TYPES,
    OpDefinition,
    refuse_gradient,
    unreachable_backward,
)


def check_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> None:
    """Raise KernelError for what no kernel takes."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise KernelError(f"ternc::embedding: indices are {indices.dtype}, not int64 or int32")
    if indices.device != weight.device:
        raise KernelError(
            f"ternc::embedding: indices are on {indices.device}, the weight is on {weight.device}"
        )
    if dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::embedding: dtype {dtype}, not float32, bfloat16 or float16")
    shape = (num_embeddings, embedding_dim, group_size, layout)
    dequantize.check_packed("embedding", weight, scale, multiplier, *shape)


def reference(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """indices [...] in [0, num_embeddings) -> [..., embedding_dim], as `ternc::dequantize` has it.

    Raises:
        IndexError: an index is out of range (on CUDA a device assertion).
    """
    numbers = (num_embeddings, embedding_dim, group_size, layout)
    check_embedding(indices, weight, scale, multiplier, *numbers, dtype)
    dispatch.record(weight, "reference")
    whole = dequantize.unpack(weight, scale, multiplier, *numbers)
    if indices.device.type == "cpu" and bool((indices < 0).any()):
        raise IndexError("ternc::embedding: a negative index is out of range")
    wanted = indices.reshape(-1).long()
    rows = Quantized(
        codes=whole.codes[wanted],
        scale=scale if scale.dim() == 1 and scale.shape[0] == 1 else scale[wanted],
        multiplier=None if whole.multiplier is None else whole.multiplier[wanted],
        group_size=group_size,
        planes=whole.planes,
    )
    return rows.dequantize().to(dtype).view(*indices.shape, embedding_dim)


def fake(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    layout: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    numbers = (num_embeddings, embedding_dim, group_size, layout)
    check_embedding(indices, weight, scale, multiplier, *numbers, dtype)
    return indices.new_empty((*indices.shape, embedding_dim), dtype=dtype)


EMBEDDING = OpDefinition(
    name="embedding",
    schema="(Tensor indices, Tensor weight, Tensor scale, Tensor? multiplier, int num_embeddings, "
    "int embedding_dim, int group_size, int layout, ScalarType dtype) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient("embedding", "keep the embedding in floating point to train it"),
    backward=unreachable_backward,
)
