"""How kernels are launched: programmatic dependent launch, the interpreter, exact arithmetic.

With programmatic dependent launch a kernel may start before the one ahead of it in the stream has
ended. Every kernel here keeps two rules, which together order any chain of them:
    1. it waits (griddepcontrol.wait) before it reads anything but a packed weight, and before it
       writes anything: by then the kernel ahead has ended and its writes are visible;
    2. it lets the next one start only after its own wait: by then everything but the kernel
       directly ahead of that next one has ended.
A packed weight is read before the wait only where nothing wrote it since its last launch
(`stable`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
from torch.utils.weak import WeakIdKeyDictionary

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors: no inline asm, no dependent launch."""

INLINE_ASM = not INTERPRETED
"""False: plain Triton in place of every block of inline asm, with equal results."""

EXACT = {"enable_fp_fusion": False}
"""Products and sums are rounded one by one, as in the references."""

_versions = WeakIdKeyDictionary()
_overlap = True


@functools.cache
def capability(index: int) -> int:
    """Compute capability of a CUDA device as a number, 90 for 9.0; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def processors(index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(index).multi_processor_count


def dependent_launch(device: torch.device) -> bool:
    """True where kernels may start before the one ahead has ended (see `alone`)."""
    return _overlap and capability(device.index or 0) >= 90


def tensor_maps(device: torch.device) -> bool:
    """True where kernels can have tiles copied by their place in a tensor."""
    return INTERPRETED or capability(device.index or 0) >= 90


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, every kernel is launched to start after the one ahead has ended: to time it alone."""
    global _overlap
    before, _overlap = _overlap, False
    try:
        yield
    finally:
        _overlap = before


def stable(weight: torch.Tensor, multiplier: torch.Tensor | None) -> bool:
    """True where neither tensor was written since the last call with this weight."""
    if weight.is_inference():
        return False  # counts no versions
    version = (weight._version, None if multiplier is None else multiplier._version)
    seen = _versions.get(weight)
    _versions[weight] = version
    return seen == version


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
