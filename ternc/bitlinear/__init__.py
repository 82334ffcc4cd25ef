"""The names of the `bitlinear` package over ternc: `from ternc.bitlinear import BitLinear`.

Thin: layers are `QATLinear` while they train and `TernaryLinear` once packed; fits, formats and
kernels are ternc's own.
"""

from __future__ import annotations

from ternc.bitlinear.functional import (
    activation_quant,
    bitlinear_python,
    greedy_ternary_decomposition,
    multi_ternary_linear_python,
)
from ternc.bitlinear.layers import (
    BitLinear,
    MultiTernaryLinear,
    PackedBitLinear,
    PackedMultiTernaryLinear,
    convert_linear_to_bitlinear,
)
from ternc.bitlinear.packing import (
    estimate_memory_savings,
    memory_report,
    pack_ternary_base3,
    unpack_ternary_base3,
)
from ternc.bitlinear.quantization import absmax_scale, ternary_quantize, weight_to_ternary

__all__ = [
    "BitLinear",
    "MultiTernaryLinear",
    "PackedBitLinear",
    "PackedMultiTernaryLinear",
    "absmax_scale",
    "activation_quant",
    "bitlinear_python",
    "convert_linear_to_bitlinear",
    "estimate_memory_savings",
    "greedy_ternary_decomposition",
    "memory_report",
    "multi_ternary_linear_python",
    "pack_ternary_base3",
    "ternary_quantize",
    "unpack_ternary_base3",
    "weight_to_ternary",
]
