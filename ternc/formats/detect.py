"""A weight that already is ternary, found by its values: w [N, K] -> exact codes and scales.

A unit (the tensor, a row, a group of columns of a row) is ternary where its nonzero elements have
one magnitude. Units are tried from large to small; sampled rows reject other weights early.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ternc.formats.quantized import Quantized, Refusal, is_finite

TENSOR, ROW = -1, 0
"""Unit sizes beside the columns of a group."""

SMALLEST_GROUP = 16
GROUP_MULTIPLE = 4
"""Group sizes that every layout holds."""

SAMPLED_ROWS = 16
NEARLY = 0.9
"""From this share of elements at their unit's magnitude on, a refusal names those that differ."""


def detect_ternary(w: torch.Tensor, group_size: int | None = None) -> Quantized | Refusal:
    """w [N, K], any float dtype -> one plane and fp32 scales that reproduce it exactly, or why not.

    Scales are [1], [N] or, by groups, free [N, G]. Group sizes tried beside `group_size`: powers of
    two from 16 and the divisors of K, multiples of 4. A float64 magnitude is rounded to fp32.
    Magnitudes are compared exactly: a weight one element off is refused.
    """
    w = w.detach()
    if w.dim() != 2 or not w.is_floating_point() or not w.numel():
        return Refusal(f"the weight is {w.dtype} {list(w.shape)}, not a floating-point matrix")
    if not is_finite(w):
        return Refusal(_non_finite(w))
    rows = torch.linspace(0, len(w) - 1, min(SAMPLED_ROWS, len(w))).round().long()
    sample = w[rows.to(w.device)].abs()
    nearly = []
    for size in _unit_sizes(w.shape[1], group_size):
        share = _share_at_magnitude(_units(sample, size))
        if share == 1.0 and (found := _exact(w, size)):
            return found
        if share >= NEARLY:
            nearly.append(size)
    if nearly:
        return Refusal(_difference(w, nearly[0]), near_ternary=True)
    return Refusal(_many_magnitudes(sample[0]))


def _unit_sizes(columns: int, group_size: int | None) -> Iterator[int]:
    """TENSOR, ROW, then columns of a group, descending."""
    yield TENSOR
    yield ROW
    powers = {1 << i for i in range(columns.bit_length())}
    divisors = {i for i in range(1, columns) if columns % i == 0}
    sizes = {size for size in powers | divisors if size >= SMALLEST_GROUP} | {group_size or 0}
    for size in sorted(sizes, reverse=True):
        if 0 < size < columns and size % GROUP_MULTIPLE == 0:
            yield size


def _units(magnitude: torch.Tensor, size: int) -> torch.Tensor:
    """|w| [N, K] -> [units, elements]; the last group of a row is filled up with zeros."""
    if size == TENSOR:
        return magnitude.reshape(1, -1)
    if size == ROW:
        return magnitude
    padding = -magnitude.shape[1] % size
    return F.pad(magnitude, (0, padding)).view(-1, size)


def _exact(w: torch.Tensor, size: int) -> Quantized | None:
    """The weight as one plane, where every unit of `size` is ternary."""
    magnitude = _units(w.abs(), size)
    scale = magnitude.amax(1)
    if ((magnitude != scale[:, None]) & (magnitude != 0)).any():
        return None
    grouped = size not in (TENSOR, ROW)
    return Quantized(
        codes=w.sign().to(torch.int8),
        scale=(scale.view(len(w), -1) if grouped else scale).float(),
        multiplier=None,
        group_size=size if grouped else 0,
        planes=1,
        exact=True,
    )


def _typical(units: torch.Tensor) -> torch.Tensor:
    """Median magnitude of the nonzero elements of every unit [U, L] -> [U, 1]."""
    ordered = units.sort(dim=1, descending=True).values
    nonzero = (units != 0).sum(1, keepdim=True)
    return ordered.gather(1, ((nonzero - 1) // 2).clamp(min=0))


def _share_at_magnitude(units: torch.Tensor) -> float:
    """Share of the nonzero elements that have the median magnitude of their unit."""
    nonzero = int((units != 0).sum())
    agreeing = int(((units == _typical(units)) & (units != 0)).sum())
    return agreeing / nonzero if nonzero else 1.0


def _difference(w: torch.Tensor, size: int) -> str:
    """How many elements are off their unit's magnitude, and where the first is."""
    units = _units(w.abs(), size)
    typical = _typical(units)
    off = (units != typical) & (units != 0)
    unit, position = off.nonzero()[0].tolist()
    columns = w.shape[1]
    if size == TENSOR:
        row, column, where = position // columns, position % columns, "the other elements have"
    elif size == ROW:
        row, column, where = unit, position, f"row {unit} has"
    else:
        per_row = -(-columns // size)
        row, first = unit // per_row, unit % per_row * size
        column, last = first + position, min(first + size, columns) - 1
        where = f"columns {first} to {last} of row {row} have"
    count = int(off.sum())
    seen, wanted = _distinct(w[row, column].item(), typical[unit].item())
    return (
        f"not exactly ternary: {count:,} of {w.numel():,} elements "
        f"{'differs' if count == 1 else 'differ'}; "
        f"element [{row}, {column}] = {seen} where {where} +-{wanted}"
    )


def _distinct(seen: float, wanted: float) -> tuple[str, str]:
    """Both numbers in the fewest digits in which their magnitudes differ."""
    for digits in (4, 6, 9):
        texts = f"{seen:.{digits}g}", f"{wanted:.{digits}g}"
        if texts[0].lstrip("-") != texts[1]:
            return texts
    return f"{seen:.17g}", f"{wanted:.17g}"


def _many_magnitudes(row: torch.Tensor) -> str:
    nonzero = row[row != 0]
    return (
        f"not ternary: the {nonzero.numel():,} nonzero elements of row 0 have "
        f"{nonzero.unique().numel():,} different magnitudes"
    )


def _non_finite(w: torch.Tensor) -> str:
    bad = (~w.isfinite()).nonzero()
    value = w[tuple(bad[0])].item()
    return f"{len(bad):,} elements are not finite; the first is {bad[0].tolist()} = {value}"
