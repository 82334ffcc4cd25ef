"""The ternc:: operators. `register()` defines them once per process; every entry point calls it."""

from __future__ import annotations

import functools
import importlib
import threading

import torch

from ternc.runtime import dispatch
from ternc.runtime.ops.activate_quantize import ACTIVATE_QUANTIZE
from ternc.runtime.ops.attention import ATTENTION
from ternc.runtime.ops.blend_quantize import BLEND_QUANTIZE, BLEND_QUANTIZE_ACT
from ternc.runtime.ops.definition import OpDefinition
from ternc.runtime.ops.dequantize import DEQUANTIZE
from ternc.runtime.ops.embedding import EMBEDDING
from ternc.runtime.ops.fake_quantize import FAKE_QUANTIZE, FAKE_QUANTIZE_ACT
from ternc.runtime.ops.fit import FIT
from ternc.runtime.ops.grouped_linear import GROUPED_LINEAR
from ternc.runtime.ops.hadamard import HADAMARD
from ternc.runtime.ops.linear import LINEAR
from ternc.runtime.ops.linears import LINEARS
from ternc.runtime.ops.linears1 import LINEARS1
from ternc.runtime.ops.norm_quantize import NORM_QUANTIZE
from ternc.runtime.ops.quantize_act import QUANTIZE_ACT
from ternc.runtime.ops.token_linears import TOKEN_LINEARS

ALL = (
    LINEAR,
    LINEARS1,
    *LINEARS,
    *TOKEN_LINEARS,
    GROUPED_LINEAR,
    QUANTIZE_ACT,
    NORM_QUANTIZE,
    ACTIVATE_QUANTIZE,
    HADAMARD,
    ATTENTION,
    DEQUANTIZE,
    EMBEDDING,
    FIT,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_ACT,
    BLEND_QUANTIZE,
    BLEND_QUANTIZE_ACT,
)

_lock = threading.Lock()


def register() -> None:
    """Define every op, its fake, its gradient and its kernels for CPU and CUDA. Idempotent.

    The CPU kernels are the C++ library's where it loads (it may compile once, under a lock), else
    the references. The CUDA kernels are Triton's; the reference serves ops without one.
    """
    with _lock:
        _library()


@functools.cache
def _library() -> torch.library.Library:
    """The definitions; they live as long as the returned object, which is never dropped."""
    library = torch.library.Library("ternc", "DEF")
    # The kernels copy what is not contiguous; the tag lets the compiler fuse that copy.
    contiguous = getattr(torch.Tag, "needs_contiguous_strides", torch.Tag.needs_fixed_stride_order)
    tags = (torch.Tag.pt2_compliant_tag, contiguous)
    for op in ALL:
        library.define(op.name + op.schema, tags=tags)
    # By name: the module is a layer above the ops, and only loading them needs it.
    cpu = importlib.import_module("ternc.runtime.cpu")
    cpu.load()
    dispatch.attach(cpu)
    importlib.import_module("ternc.runtime.gpu").load(library)
    for op in ALL:
        _implement(library, op)
    return library


def _implement(library: torch.library.Library, op: OpDefinition) -> None:
    name = f"ternc::{op.name}"
    for device in ("CPU", "CUDA"):
        # Whatever the C++ library brought is kept.
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, device):
            library.impl(op.name, op.reference, device)
    torch.library.register_fake(name, op.fake, lib=library)
    torch.library.register_autograd(name, op.backward, setup_context=op.setup_context, lib=library)
    if op.autocast:
        for device in ("CPU", "CUDA"):
            library.impl(op.name, op.autocast(device.lower()), f"Autocast{device}")
