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


def resident_layout(planes: int, device_type: str) -> int:
    """Number of the layout that the kernels of a device type ("cpu", "cuda", ...) read."""
    return {"cpu": 10, "cuda": 20}.get(device_type, 0) + planes
