"""Tensors of a sharded run <-> safetensors files of which every process writes and reads its share.

torch.distributed.checkpoint plans who writes what; the files say which rows they hold, so that any
number of processes reads them, one without a process group included. No pickle.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ternc.errors import CheckpointError

FOLDER = "sharded"

Empty = Callable[[str, torch.Size, torch.dtype], torch.Tensor]
"""Name, whole shape, dtype -> a tensor to read into, sharded as it is to be held."""


def write_sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes folder/sharded; every process calls it with the same names."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    target = folder / FOLDER
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # shards of more processes would stay
        target.mkdir()
    dist.barrier()
    writer = HuggingFaceStorageWriter(path=str(target), save_distributed=True)
    checkpoint.save(dict(tensors), storage_writer=writer)


def read_sharded(folder: Path, empty: Empty) -> dict[str, torch.Tensor]:
    """Every tensor of folder/sharded; every process calls it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    target = folder / FOLDER
    if not any(target.glob("*.safetensors")):
        raise CheckpointError(f"{target} is missing")
    reader = HuggingFaceStorageReader(path=str(target))
    try:
        found: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = {
            name: empty(name, value.size, value.properties.dtype) for name, value in found.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            checkpoint.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        checkpoint.CheckpointException,
    ) as error:
        raise CheckpointError(f"{target} is damaged: {error}") from error
    return tensors
