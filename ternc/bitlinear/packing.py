"""Trits <-> bytes, five a byte and rows aligned; what that saves, estimated and measured."""

from __future__ import annotations

import torch
from torch import nn

from ternc.errors import WeightShapeError
from ternc.formats import trits
from ternc.reporting import model_bytes


def pack_ternary_base3(
    W_ternary: torch.Tensor,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Trits [..., K] -> (uint8 [..., ceil(K / 5)], shape): byte = sum_i (t_i + 1) 3^i along a row.

    Rows do not share bytes; a row is filled up with trit 0.

    Raises:
        WeightShapeError: an element is not -1, 0 or 1.
    """
    codes = W_ternary.detach()
    if not bool(((codes == 0) | (codes.abs() == 1)).all()):
        raise WeightShapeError("pack_ternary_base3: the weight holds other values than -1, 0, 1")
    shape = tuple(W_ternary.shape)
    rows = codes.to(torch.int8).reshape(-1, shape[-1])
    return trits.pack(rows, 1).view(*shape[:-1], trits.packed_width(shape[-1])), shape


def unpack_ternary_base3(
    packed: torch.Tensor, original_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Inverse of `pack_ternary_base3`.

    Raises:
        WeightShapeError: the bytes are not of that shape.
        CheckpointError: a byte over 242 encodes no five trits.
    """
    shape = tuple(original_shape)
    wanted = (*shape[:-1], trits.packed_width(shape[-1]))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != wanted:
        raise WeightShapeError(
            f"unpack_ternary_base3: {packed.dtype} {list(packed.shape)}, wanted uint8 "
            f"{list(wanted)} for trits {list(shape)}"
        )
    trits.check_bytes(packed, "unpack_ternary_base3")
    return trits.unpack(packed.reshape(1, -1, wanted[-1]), shape[-1]).view(shape).to(dtype)


def estimate_memory_savings(
    in_features: int, out_features: int, num_layers: int = 1
) -> dict[str, float]:
    """Bytes of linear layers as float32, bfloat16 and packed with an fp16 scale a row.

    An estimate of weights alone: `memory_report(model)` measures a whole model.
    """
    count = in_features * out_features * num_layers
    packed = num_layers * out_features * (trits.packed_width(in_features) + 2)
    return {
        "float32_bytes": 4 * count,
        "bfloat16_bytes": 2 * count,
        "packed_bytes": packed,
        "savings_bytes": 4 * count - packed,
        "compression_ratio": 4 * count / packed,
        "compression_ratio_bfloat16": 2 * count / packed,
        "bits_per_weight": 8 * packed / count,
    }


def memory_report(model: nn.Module) -> dict[str, int]:
    """Measured bytes: parameters and buffers, each storage once; packed weights are buffers."""
    parameters = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    own = sum(p.untyped_storage().nbytes() for p in parameters.values())
    total = model_bytes(model)
    return {"parameters": own, "buffers": total - own, "total": total}
