"""Identity of a weight: which tensors are one and the same."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are one weight: one object, or the same elements of one storage."""
    if nn.parameter.is_lazy(tensor) or type(tensor.data) is not torch.Tensor:
        return id(tensor)
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
