"""`WeightSite`: one weight that a rule rewrote, from the graph's inputs to its packed tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ternc.formats.quantized import Quantized
from ternc.reporting import Row


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one weight becomes, and why. `quantized` is None where it stays floating point."""

    quantized: Quantized | None
    reason: str
    error: float | None = None
    """||W - Q|| / ||W||; 0.0 where the weight is held exactly."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the compiled graph was specialised on; packed tensors of another variant do not fit
    it.
    """

    layout: int
    group_size: int
    scale_shape: tuple[int, ...]
    has_multiplier: bool


@dataclasses.dataclass
class WeightSite:
    """A weight computed from static graph inputs, replaced by packed inputs of the rewritten
    graph.
    """

    name: str
    """Module path."""
    inputs: tuple[int, ...]
    """Positions, among the inputs of the graph, of the tensors that the weight is computed from."""
    key: str
    """Text of the computation; equal keys over equal tensors give equal weights."""
    evaluate: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """Tensors at `inputs` -> weight [N, K]."""
    decide: Callable[[torch.Tensor, int | None], Decision]
    """(weight, plane count of the compiled site or None) -> decision."""
    planes: int
    """Plane count that the compiled graph expects."""
    variant: Variant
    device: str
    """Device type of the weight."""
    row: Row
    own_quantizer: bool = False
    """The model quantised the activations itself; that code was removed from the graph."""
    first: Decision | None = None
    """The decision for the weight that the graph was compiled with; lowering packs it and lets go
    of it.
    """
