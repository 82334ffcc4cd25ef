"""Every layout by number, and the one a device reads. Adding a layout is a file and a line here."""

from __future__ import annotations

from ternc.errors import KernelError
from ternc.formats import dense, int8, lanes, p256, rows
from ternc.formats.layout import Layout

ALL: dict[int, Layout] = {
    layout.number: layout
    for layout in (*rows.LAYOUTS, *lanes.LAYOUTS, *dense.LAYOUTS, *p256.LAYOUTS, *int8.LAYOUTS)
}


def get(number: int) -> Layout:
    """The layout with this number; KernelError where there is none."""
    if number not in ALL:
        raise KernelError(f"layout {number} is not known; known are {sorted(ALL)}")
    return ALL[number]


def at_rest_layout(planes: int) -> int:
    """Number of the layout of state_dict and files: rows."""
    return planes


_dense_from = 0
"""Codes from which on a weight is dense on the CPU; 0: none is. The processor decides."""


def prefer_dense(codes: int) -> None:
    """From now on hold weights of one plane and at least this many codes in 1.6 bits on the CPU.

    0: none. Called by `ternc.runtime.cpu` for the kernels in use.
    """
    global _dense_from
    _dense_from = codes


def resident_layout(planes: int, device_type: str, codes: int = 0) -> int:
    """Number of the layout that the kernels of a device type ("cpu", "cuda", ...) read.

    Args:
        codes: N * K of one weight with tied scales; 0 for weights that must not be dense, such as
            a stack of several, whose borders lie between blocks of 64 or 128 rows.
    """
    if planes == 1 and device_type == "cpu" and 0 < _dense_from <= codes:
        return dense.NUMBER
    return {"cpu": 10, "cuda": 20}.get(device_type, 0) + planes
