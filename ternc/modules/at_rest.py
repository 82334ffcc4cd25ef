"""Packed weight <-> tensors of a state_dict: base-3 trits, scales, multipliers, on any device.

    trits           uint8 [P, N, ceil(K/5)]; or codes, int8 [N, K], of an int8 weight
    scale           fp16 [N] or [1] with scale_exponent int32 [] (scale = stored * 2**exponent);
                    fp32 without exponent where fp16 would lose bits; [N, G] or [N, G, P] where
                    scales are free
    multiplier      uint8 [N, G], only where groups share a scale
    rotation        int64 [2]: block and seed, only where the weight is rotated

The group size is not stored: the layer that is loaded knows it; the number of groups is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from ternc.config import CODE_MAX, INT8, LARGEST_CODE
from ternc.errors import CheckpointError, WeightShapeError
from ternc.formats import layouts, trits
from ternc.formats.packed import Packed, to_layout, unpack
from ternc.formats.quantized import Quantized, check_multiplier, group_count
from ternc.formats.rotation import MAX_BLOCK, Rotation
from ternc.formats.scales import scale_from_storage, scale_to_storage

NAMES = ("trits", "codes", "scale", "scale_exponent", "multiplier", "rotation")
"""Every key of a packed weight, without the prefix of its module."""

_EXPONENTS = range(-256, 129)
"""Exponents that a finite fp32 scale can have; others come from a damaged file."""


def to_state(packed: Packed, rotation: Rotation | None = None) -> dict[str, torch.Tensor]:
    """The tensors at rest, on the device of `packed`; they share no memory with it but the scale's.

    Raises:
        WeightShapeError: never for a weight that `pack` made.
    """
    if packed.free_planes > 1:
        quantized, order = unpack(packed), layouts.get(layouts.at_rest_layout(packed.planes))
        rest = dataclasses.replace(
            packed, weight=order.pack(quantized.codes), scale=quantized.scale, free_planes=1
        )
    else:
        rest = to_layout(packed, layouts.at_rest_layout(packed.planes))
    scale, exponent = (rest.scale, 0) if rest.scale.is_meta else scale_to_storage(rest.scale)
    state = {"trits": rest.weight, "scale": scale}
    if packed.planes == INT8:
        state = {"codes": rest.weight.view(torch.int8), "scale": scale}
    if scale.dtype == torch.float16:
        state["scale_exponent"] = torch.tensor(exponent, dtype=torch.int32)
    if rest.multiplier is not None:
        state["multiplier"] = rest.multiplier
    if rotation is not None:
        state["rotation"] = torch.tensor([rotation.block, rotation.seed])
    return state


def from_state(
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    shape: tuple[int, int],
    group_sizes: Iterable[int],
) -> Quantized:
    """The weight that `to_state` wrote, checked: the tensors may come from anywhere.

    Args:
        tensors: by the names in `NAMES`.
        prefix: of the module, for messages.
        shape: (N, K) that the weight must have.
        group_sizes: group sizes the weight may have, the likeliest first.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds impossible bytes.
    """
    try:
        codes, planes = _codes(tensors, prefix, shape)
        scale = _scale(tensors, prefix)
        if not scale.isfinite().all():
            raise CheckpointError(
                f"{prefix}scale holds {int((~scale.isfinite()).sum()):,} values that are not "
                "finite; save or copy the folder again"
            )
        multiplier = tensors.get("multiplier")
        quantized = Quantized(
            codes=codes,
            scale=scale,
            multiplier=multiplier,
            group_size=_group_size(scale, multiplier, shape[1], group_sizes, prefix),
            planes=planes,
        )
        check_multiplier(quantized)
    except WeightShapeError as error:
        raise CheckpointError(f"{prefix}trits or codes: {error}") from error
    return quantized


def rotation_from_state(
    tensors: Mapping[str, torch.Tensor], prefix: str, columns: int
) -> Rotation | None:
    """The rotation that `to_state` wrote, checked, or None where there is none.

    Raises:
        CheckpointError: it is none of rows of `columns`.
    """
    stored = tensors.get("rotation")
    if stored is None:
        return None
    if stored.dtype != torch.int64 or stored.shape != (2,):
        raise CheckpointError(
            f"{prefix}rotation is {stored.dtype} {list(stored.shape)}; int64 [2] is wanted"
        )
    block, seed = stored.tolist()
    if block < 2 or block > MAX_BLOCK or block & (block - 1) or columns % block:
        raise CheckpointError(
            f"{prefix}rotation has block {block}; a power of two up to {MAX_BLOCK} that divides "
            f"{columns} columns is wanted"
        )
    return Rotation(block, seed)


def _get(tensors: Mapping[str, torch.Tensor], name: str, prefix: str) -> torch.Tensor:
    if name not in tensors:
        raise CheckpointError(f"{prefix}{name} is missing beside {sorted(tensors)}")
    return tensors[name]


def _codes(
    tensors: Mapping[str, torch.Tensor], prefix: str, shape: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """Codes int8 [N, K] and the number of planes, or INT8."""
    if "codes" not in tensors:
        stored = _get(tensors, "trits", prefix)
        planes = _check_trits(stored, prefix, shape)
        return trits.unpack(stored, shape[1]), planes
    codes = tensors["codes"]
    if "trits" in tensors:
        raise CheckpointError(f"{prefix}codes stand beside trits: a weight is one of them")
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape:
        raise CheckpointError(
            f"{prefix}codes is {codes.dtype} {list(codes.shape)}; int8 {list(shape)} is wanted"
        )
    if codes.numel() and int(codes.min()) < -LARGEST_CODE[INT8]:
        raise CheckpointError(f"{prefix}codes holds -128; int8 weights end at -127")
    return codes, INT8


def _check_trits(packed: torch.Tensor, prefix: str, shape: tuple[int, int]) -> int:
    """Number of planes."""
    wanted = (shape[0], trits.packed_width(shape[1]))
    seen = tuple(packed.shape)
    if packed.dtype != torch.uint8 or packed.dim() != 3 or seen[1:] != wanted:
        raise CheckpointError(
            f"{prefix}trits is {packed.dtype} {list(seen)}; a weight of {shape[0]} x {shape[1]} "
            f"needs uint8 [planes, {wanted[0]}, {wanted[1]}]"
        )
    if seen[0] not in CODE_MAX:
        raise CheckpointError(f"{prefix}trits has {seen[0]} planes; 1, 2 and 3 are known")
    trits.check_bytes(packed, f"{prefix}trits")
    return seen[0]


def _scale(tensors: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    scale, exponent = _get(tensors, "scale", prefix), tensors.get("scale_exponent")
    if exponent is None:
        if scale.dtype != torch.float32:
            raise CheckpointError(
                f"{prefix}scale is {scale.dtype} without scale_exponent; float32 is wanted"
            )
        return scale
    if scale.dtype != torch.float16:
        raise CheckpointError(f"{prefix}scale is {scale.dtype} beside scale_exponent, not float16")
    if exponent.dtype != torch.int32 or exponent.numel() != 1 or int(exponent) not in _EXPONENTS:
        raise CheckpointError(
            f"{prefix}scale_exponent is {exponent.dtype} {exponent.flatten()[:4].tolist()}; one "
            f"int32 from {_EXPONENTS[0]} to {_EXPONENTS[-1]} is wanted"
        )
    return scale_from_storage(scale, int(exponent))


def _group_size(
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    columns: int,
    group_sizes: Iterable[int],
    prefix: str,
) -> int:
    grouped = multiplier if multiplier is not None else scale
    if grouped.dim() < 2:
        return 0
    known = [size for size in group_sizes if size > 0]
    for size in known:
        if group_count(columns, size) == grouped.shape[1]:
            return size
    raise CheckpointError(
        f"{prefix}trits: the weight has {grouped.shape[1]} groups in a row of {columns} columns, "
        f"which no group_size of this layer gives ({known or 'it has none'}); build the layer with "
        "the configuration that it was saved with"
    )
