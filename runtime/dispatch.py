"""Which kernel really ran last on a packed weight: for the report's `kernel` column.

The C++ library keeps its own table; Python kernels record here. Keys are data pointers, so that
neither a tensor nor its memory is kept alive.
"""

from __future__ import annotations

import sys

import torch

_last: dict[int, str] = {}


def record(weight: torch.Tensor, kernel: str) -> None:
    """Called by a Python kernel's entry point, with the packed weight uint8 that it reads."""
    _last[weight.data_ptr()] = kernel


def last_kernel(weight: torch.Tensor) -> str | None:
    """Name of the kernel that last read `weight`, None where none has."""
    kernel = _last.get(weight.data_ptr())
    # Without the module no C++ kernel has run.
    cpu = sys.modules.get("ternc.runtime.cpu")
    return kernel or (cpu.last_kernel(weight) if cpu else None)


def forget(weight: torch.Tensor) -> None:
    """Drop what is known of `weight`: called when its memory is given back or repacked."""
    _last.pop(weight.data_ptr(), None)
