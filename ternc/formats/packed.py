"""`Packed`: a quantised weight in one resident byte layout. pack and unpack are lossless.

Quantized(codes, scale, multiplier) <-> Packed(weight bytes, scale, multiplier in kernel order)
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.errors import WeightShapeError
from ternc.formats import layouts
from ternc.formats.quantized import Quantized, group_count
from ternc.formats.scales import scale_to_storage


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """The tensors that `ternc::linear` takes, and what they mean."""

    weight: torch.Tensor
    """uint8, `layouts.get(layout).weight_shape(N, K)`."""
    scale: torch.Tensor
    """fp32 [N], [1] or [N, G]; never reordered."""
    multiplier: torch.Tensor | None
    """uint8, `layouts.get(layout).multiplier_shape(N, G)`, or None."""
    shape: tuple[int, int]
    """(N, K) of the weight."""
    group_size: int
    layout: int
    exact: bool = False
    """As in `Quantized`."""

    @property
    def planes(self) -> int:
        return layouts.get(self.layout).planes

    @property
    def nbytes(self) -> int:
        """Resident bytes of the real buffers, padding included."""
        buffers = [self.weight, self.scale, self.multiplier]
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    @property
    def nbytes_at_rest(self) -> int:
        """Bytes in a state_dict or file: base-3 rows, multipliers, fp16 scales where lossless."""
        rows, columns = self.shape
        rest = layouts.get(layouts.at_rest_layout(self.planes))
        stored, _ = scale_to_storage(self.scale)
        multipliers = 0 if self.multiplier is None else rows * group_count(columns, self.group_size)
        return rest.nbytes(rows, columns) + stored.nbytes + multipliers


def pack(quantized: Quantized, target: str | int) -> Packed:
    """A quantised weight in the layout of a device type ("cpu", "cuda") or of a layout number.

    The tensors stay on the device they are on.

    Raises:
        WeightShapeError: the layout cannot hold the group size or the number of planes.
    """
    planes = quantized.planes
    number = _number(planes, target, quantized.scale, quantized.shape)
    layout = layouts.get(number)
    if layout.planes != planes:
        raise WeightShapeError(f"layout {number} holds {layout.planes} planes, the weight {planes}")
    if quantized.group_size % layout.group_multiple:
        raise WeightShapeError(
            f"group_size={quantized.group_size} is not a multiple of {layout.group_multiple}, "
            f"which layout {layout.name!r} needs; quantise with another group_size"
        )
    multiplier = quantized.multiplier
    return Packed(
        weight=layout.pack(quantized.codes),
        scale=quantized.scale,
        multiplier=None if multiplier is None else layout.pack_multiplier(multiplier),
        shape=quantized.shape,
        group_size=quantized.group_size,
        layout=number,
        exact=quantized.exact,
    )


def _number(planes: int, target: str | int, scale: torch.Tensor, shape: tuple[int, int]) -> int:
    if isinstance(target, int):
        return target
    return layouts.resident_layout(planes, target, tied_codes(scale, shape))


def tied_codes(scale: torch.Tensor, shape: tuple[int, int]) -> int:
    """N * K, or 0 where scales are free: what `resident_layout` wants to know."""
    return shape[0] * shape[1] if scale.dim() == 1 else 0


def unpack(packed: Packed) -> Quantized:
    """The inverse of `pack`, bit for bit."""
    layout = layouts.get(packed.layout)
    rows, columns = packed.shape
    multiplier = packed.multiplier
    return Quantized(
        codes=layout.unpack(packed.weight, rows, columns),
        scale=packed.scale,
        multiplier=None if multiplier is None else layout.unpack_multiplier(multiplier, rows),
        group_size=packed.group_size,
        planes=layout.planes,
        exact=packed.exact,
    )


def to_layout(packed: Packed, target: str | int) -> Packed:
    """The same weight in another layout; `packed` itself where it already is in that one."""
    number = _number(packed.planes, target, packed.scale, packed.shape)
    return packed if number == packed.layout else pack(unpack(packed), number)
