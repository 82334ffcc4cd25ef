"""`WeightSite`: one weight that a rule rewrote, from the graph's inputs to its packed tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ternc.formats import layouts
from ternc.formats.packed import Packed
from ternc.formats.quantized import Quantized, group_count
from ternc.formats.rotation import Rotation
from ternc.reporting import Row


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one weight becomes, and why. `quantized` is None where it stays floating point."""

    quantized: Quantized | None
    reason: str
    error: float | None = None
    """||W - Q|| / ||W||; 0.0 where the weight is held exactly."""
    output_error: float | None = None
    """Relative error of the layer's outputs on held-out calibration data."""
    rotation: Rotation | None = None
    """`quantized` is the rotated weight, to be multiplied with rotated inputs."""
    bias: torch.Tensor | None = None
    """Corrected bias [N]; None where the layer keeps its own."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the compiled graph was specialised on; packed tensors of another variant do not fit
    it.
    """

    layout: int
    group_size: int
    scale_shape: tuple[int, ...]
    has_multiplier: bool
    rotated: bool = False
    """The packed weight is that of rotated inputs."""


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
    shape: tuple[int, int]
    """(N, K) of the weight that is packed, padding included."""
    row: Row
    stacked: bool = False
    """Several weights, one below the other: their borders are those of the plain layouts."""
    rotation: Rotation | None = None
    """Rotation of the inputs in the compiled graph."""
    own_quantizer: bool = False
    """The model quantised the activations itself; that code was removed from the graph."""
    first: Decision | None = None
    """The decision for the weight that the graph was compiled with; lowering packs it and lets go
    of it.
    """

    def empty_packed(self, like: torch.Tensor) -> Packed:
        """Tensors of the packed form without values, in the fake mode and on the device of
        `like`.
        """
        rows, columns = self.shape
        variant = self.variant
        layout = layouts.get(variant.layout)
        groups = group_count(columns, variant.group_size)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return like.new_empty(shape, dtype=dtype, requires_grad=False)

        multiplier = None
        if variant.has_multiplier:
            multiplier = empty(layout.multiplier_shape(rows, groups), torch.uint8)
        return Packed(
            weight=empty(layout.weight_shape(rows, columns), torch.uint8),
            scale=empty(variant.scale_shape, torch.float32),
            multiplier=multiplier,
            shape=(rows, columns),
            group_size=variant.group_size,
            layout=variant.layout,
        )


@dataclasses.dataclass(frozen=True)
class TrainedWeight:
    """A weight that the rewritten graph quantises in the forward pass and trains.

    Its schedule is two inputs of the graph, the states of weight and activations.
    """

    name: str
    """Module path."""
    position: int
    """Position, among the inputs of the graph, of the Parameter that it is computed from."""
    key: str
    """Text of the computation, "" for the Parameter itself."""
    evaluate: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """[Parameter] -> weight [N, K]."""
    planes: int
    group_size: int
    """Columns, 0 = row, -1 = tensor."""
    activation_bits: int
