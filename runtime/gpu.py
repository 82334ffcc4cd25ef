"""The CUDA implementations of the ops. Triton is imported when an op first runs on a GPU.

Without Triton, or below compute capability 8.0, the references run, with one warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ternc.runtime.ops import (
    activate_quantize,
    blend_quantize,
    dequantize,
    embedding,
    fake_quantize,
    fit,
    grouped_linear,
    hadamard,
    linear,
    linears,
    linears1,
    norm_quantize,
    quantize_act,
    token_linears,
)

FIRST_CAPABILITY = (8, 0)
"""Compute capability of Ampere: int8 tensor cores and asynchronous copies."""

KERNELS: dict[str, tuple[str, str, Any]] = {
    "linear": ("linear", "linear", linear.reference),
    "linears1": ("linear", "linears1", linears1.reference),
    "grouped_linear": ("linear_grouped", "grouped_linear", grouped_linear.grouped_linear),
    "dequantize": ("dequantize", "dequantize", dequantize.reference),
    "embedding": ("dequantize", "embedding", embedding.reference),
    "quantize_act": ("quantize_act", "quantize_act", quantize_act.reference),
    "norm_quantize": ("fused_quantize", "norm_quantize", norm_quantize.reference),
    "activate_quantize": ("fused_quantize", "activate_quantize", activate_quantize.reference),
    "hadamard": ("rotate", "hadamard", hadamard.reference),
    "blend_quantize": ("blend", "blend_quantize", blend_quantize.weight_reference),
    "blend_quantize_act": ("blend", "blend_quantize_act", blend_quantize.activation_reference),
    "fit": ("fit", "fit", fit.reference),
    "fake_quantize": ("fit", "fake_quantize", fake_quantize.weight_reference),
    "fake_quantize_act": (
        "quantize_act",
        "fake_quantize_act",
        fake_quantize.activation_reference,
    ),
}
KERNELS |= {op.name: ("linear", "linears", linears.reference) for op in linears.LINEARS}
KERNELS |= {
    op.name: ("token_linears", "token_linears", token_linears.reference)
    for op in token_linears.TOKEN_LINEARS
}
"""Op -> module of ternc.runtime.kernels.triton, function in it, reference."""


def load(library: torch.library.Library) -> None:
    """Register the CUDA implementations; imports neither Triton nor anything of CUDA."""
    for name in KERNELS:
        library.impl(name, functools.partial(_run, name), "CUDA")


def missing(index: int = 0) -> str | None:
    """Why the kernels cannot run on this CUDA device, None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability(index) < FIRST_CAPABILITY:
        return f"compute capability of {torch.cuda.get_device_name(index)} is below 8.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def _run(name: str, *arguments: Any) -> Any:
    first = arguments[0]
    function = _function(name, first.device.index or 0)
    if first.device.index == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device(first.device):
        return function(*arguments)


@functools.cache
def _function(name: str, index: int) -> Callable[..., Any]:
    module, function, reference = KERNELS[name]
    if reason := _missing_once(index):
        warnings.warn(
            f"ternc: no GPU kernels, the slow eager references run instead: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
        return reference
    return getattr(importlib.import_module(f"ternc.runtime.kernels.triton.{module}"), function)


@functools.cache
def _missing_once(index: int) -> str | None:
    return missing(index)
