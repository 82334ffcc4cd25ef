"""A loop of small kernels, run as it is, or on a GPU recorded once per shape and then replayed.

A step of such a loop takes a GPU a few microseconds and its launch several times as long: a CUDA
graph launches the whole loop at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch

Loop = Callable[..., tuple[torch.Tensor, ...]]
"""(tensors, then numbers) -> tensors: the same kernels whatever the values; it may write to the
tensors it is given."""

_recorded: dict[Hashable, _Recording | None] = {}
"""By loop, shapes and numbers; None where recording failed."""


def replay(
    loop: Loop, tensors: tuple[torch.Tensor, ...], *numbers: float
) -> tuple[torch.Tensor, ...]:
    """What loop(*tensors, *numbers) returns. The tensors are scratch afterwards."""
    if tensors[0].device.type != "cuda":
        return loop(*tensors, *numbers)
    kinds = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
    key = (loop, kinds, numbers)
    if key not in _recorded:
        try:
            _recorded[key] = _Recording(loop, tensors, numbers)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            warnings.warn(f"calibration runs unrecorded, and slowly: {first}", stacklevel=2)
            _recorded[key] = None
    recording = _recorded[key]
    return loop(*tensors, *numbers) if recording is None else recording(tensors)


class _Recording:
    """A CUDA graph with tensors of its own."""

    def __init__(
        self, loop: Loop, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]
    ) -> None:
        self._inputs = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once unrecorded: what is loaded lazily is loaded then
            loop(*self._inputs, *numbers)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = loop(*self._inputs, *numbers)

    def __call__(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
