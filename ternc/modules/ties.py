"""Identity of a weight: which tensors are one and the same."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn


def matrix_key(module: nn.Module) -> Hashable | None:
    """`memory_key` of the module's own `weight`, None where that is no matrix."""
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.dim() != 2:
        return None
    return memory_key(weight)


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one weight: one object, or the same elements of one storage."""
    if nn.parameter.is_lazy(tensor) or type(tensor.data) is not torch.Tensor:
        return id(tensor)
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
