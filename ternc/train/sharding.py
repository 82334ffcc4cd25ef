"""What differs between processes: their number, and tensors cut over them.

Tensors that `torch.distributed.fsdp.fully_shard` has cut over processes <-> whole ones.

Between forward passes a Parameter is a DTensor of which each process holds some rows; quantisers,
logs and checkpoints want all of it. Every process must call these functions together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered where it is sharded; differentiable."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as `reference` is; one that is sharded already stays as it is."""
    mesh: Any = getattr(reference, "device_mesh", None)
    if mesh is None or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placements = reference.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(reference.device), mesh, placements)


def rank() -> int:
    """Number of this process; 0 without process groups."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1
