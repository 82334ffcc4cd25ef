"""`Packed`: a quantised weight in one resident byte layout. pack and unpack are lossless.

Quantized(codes, scale, multiplier) <-> Packed(weight bytes, scale, multiplier in kernel order)
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.errors import WeightShapeError
from ternc.formats import layouts, planewise
from ternc.formats.quantized import Quantized, group_count
from ternc.formats.scales import scale_to_storage


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """The tensors that `ternc::linear` takes, and what they mean."""

    weight: torch.Tensor
    """uint8, `layouts.get(layout).weight_shape(N, K)`."""
    scale: torch.Tensor
    """fp32 [N], [1], [N, G] or, of free planes, [N, G P]; never reordered."""
    multiplier: torch.Tensor | None
    """uint8, `layouts.get(layout).multiplier_shape(N, G)`, or None."""
    shape: tuple[int, int]
    """(N, K) of the weight."""
    group_size: int
    layout: int
    exact: bool = False
    """As in `Quantized`."""
    free_planes: int = 1
    """Planes with scales of their own: `weight` has one plane, and holds them side by side in its
    columns (`formats/planewise.py`).
    """

    @property
    def planes(self) -> int:
        return layouts.get(self.layout).planes * self.free_planes

    @property
    def columns(self) -> int:
        """Those that `weight` has: K unless planes are free."""
        columns = self.shape[1]
        free = self.free_planes > 1
        return planewise.width(columns, self.free_planes, self.group_size) if free else columns

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
    if quantized.planewise:
        return _pack_planes(quantized, target)
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


def _pack_planes(quantized: Quantized, target: str | int) -> Packed:
    """Free planes as a weight of one plane."""
    planes, size = quantized.planes, quantized.group_size
    apart = dataclasses.replace(
        quantized,
        codes=planewise.spread(quantized.codes, planes, size),
        scale=quantized.scale.flatten(1),
        planes=1,
    )
    return dataclasses.replace(pack(apart, target), shape=quantized.shape, free_planes=planes)


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
    rows, columns = packed.shape[0], packed.columns
    multiplier = packed.multiplier
    if packed.free_planes > 1:
        planes, size = packed.free_planes, packed.group_size
        trits = layout.unpack(packed.weight, rows, columns)
        return Quantized(
            codes=planewise.gathered(trits, planes, size, packed.shape[1]),
            scale=packed.scale.unflatten(1, (-1, planes)),
            multiplier=None,
            group_size=size,
            planes=planes,
            exact=packed.exact,
        )
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
    stored = layouts.get(packed.layout).planes
    number = _number(stored, target, packed.scale, packed.shape)
    return packed if number == packed.layout else pack(unpack(packed), number)
