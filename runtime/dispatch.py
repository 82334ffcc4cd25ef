"""Which kernel really ran last on a packed weight: for the report's `kernel` column.

The C++ library keeps its own table; Python kernels record here. Keys are data pointers, so that
neither a tensor nor its memory is kept alive.
"""

from __future__ import annotations

from typing import Protocol

import torch


class KernelTable(Protocol):
    """What a library of kernels answers about a packed weight: `ternc.runtime.cpu`."""

    def last_kernel(self, weight: torch.Tensor) -> str | None: ...

    def forget_kernel(self, weight: torch.Tensor) -> None: ...


_last: dict[int, str] = {}
_libraries: list[KernelTable] = []


def attach(library: KernelTable) -> None:
    """Ask `library` too from now on; called once for each, by `ops.register`."""
    _libraries.append(library)


def record(weight: torch.Tensor, kernel: str) -> None:
    """Called by a Python kernel's entry point, with the packed weight uint8 that it reads."""
    if weight.is_cpu:
        # What a library knows of this memory is older, if not of a weight that it held before.
        for library in _libraries:
            library.forget_kernel(weight)
    _last[weight.data_ptr()] = kernel


def last_kernel(weight: torch.Tensor) -> str | None:
    """Name of the kernel that last read `weight`, None where none has."""
    known = (library.last_kernel(weight) for library in _libraries)
    return next((name for name in known if name), _last.get(weight.data_ptr()))


def forget(weight: torch.Tensor) -> None:
    """Drop what is known of `weight`: called when its memory is given back or repacked."""
    _last.pop(weight.data_ptr(), None)
    for library in _libraries:
        library.forget_kernel(weight)
