"""Packed tensors on one device -> on another, in the byte order that its kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ternc.formats import layouts
from ternc.formats.packed import Packed, tied_codes, to_layout
from ternc.formats.quantized import group_count

_MOVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Packed bytes before a move -> (the function that moved them, the result): ties survive `to()`."""


def moved(packed: Packed, fn: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
    """`fn` applied as a change of device or memory, never as a cast; once for shared buffers."""
    known = _MOVED.get(packed.weight)
    if known is not None and known[0] is fn:
        return known[1]
    weight = uncast(packed.weight, fn)
    device = weight.device
    after = dataclasses.replace(
        packed,
        weight=weight,
        scale=uncast(packed.scale, fn),
        multiplier=None if packed.multiplier is None else uncast(packed.multiplier, fn),
    )
    if device.type != packed.weight.device.type and device.type != "meta":
        number = layouts.resident_layout(
            layouts.get(packed.layout).planes,
            device.type,
            tied_codes(packed.scale, packed.shape),
        )
        if packed.weight.is_meta:
            after = _uninitialised(after, number, device)
        else:
            after = to_layout(after, number)
    if after.weight is not packed.weight:
        _MOVED[packed.weight] = (fn, after)
    return after


def uncast(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`fn(tensor)` in the dtype of `tensor`."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


def _uninitialised(packed: Packed, number: int, device: torch.device) -> Packed:
    """Memory for a weight that was on the meta device, as `to_empty` wants it."""
    layout = layouts.get(number)
    rows, columns = packed.shape[0], packed.columns
    weight = torch.empty(layout.weight_shape(rows, columns), dtype=torch.uint8, device=device)
    multiplier = None
    if packed.multiplier is not None:
        groups = group_count(columns, packed.group_size)
        multiplier = weight.new_empty(layout.multiplier_shape(rows, groups))
    return dataclasses.replace(packed, weight=weight, multiplier=multiplier, layout=number)


def to_device(packed: Packed, device: torch.device) -> Packed:
    """The same bytes on `device`."""
    return dataclasses.replace(
        packed,
        weight=packed.weight.to(device),
        scale=packed.scale.to(device),
        multiplier=None if packed.multiplier is None else packed.multiplier.to(device),
    )
