"""Ternary weights as numbers (`Quantized`), as bytes (`Packed`), and the way there from floats."""

from ternc.formats.detect import detect_ternary
from ternc.formats.fit import choose
from ternc.formats.layouts import resident_layout
from ternc.formats.packed import Packed, pack, to_layout, unpack
from ternc.formats.quantized import Quantized, Refusal

__all__ = [
    "Packed",
    "Quantized",
    "Refusal",
    "choose",
    "detect_ternary",
    "pack",
    "resident_layout",
    "to_layout",
    "unpack",
]
