"""activate_quantize(gate, up) -> (q, sx): activation function, product, Hadamard, integers, one
pass.

h = act(gate) * up (or act(gate)); where block > 0 the block Hadamard transform of h; quantize_act.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ternc.errors import KernelError
from ternc.runtime.ops import hadamard, quantize_act
from ternc.runtime.ops.definition import OpDefinition, refuse_gradient, unreachable_backward

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""Activation functions by the name in the op's argument; fp32 in and out."""


def check_activate_quantize(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
) -> None:
    """Raise KernelError for what no kernel takes."""
    quantize_act.check_quantize_act(gate, bits)
    if activation not in ACTIVATIONS:
        raise KernelError(
            f"ternc::activate_quantize: activation={activation!r}, not one of {list(ACTIVATIONS)}"
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise KernelError(
            f"ternc::activate_quantize: up is {up.dtype} {list(up.shape)}, gate {gate.dtype} "
            f"{list(gate.shape)}"
        )
    if block:
        hadamard.check_hadamard(gate, signs, block)


def reference(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate, up [..., K] -> q int8 [..., K], sx fp32 [..., 1].

    The activation is computed in fp32 and rounded to the dtype of gate, the product rounded again,
    as the separate operations do. q may differ by 1 from another kernel's in at most 0.1 % of
    elements.
    """
    check_activate_quantize(gate, up, activation, signs, block, bits)
    h = ACTIVATIONS[activation](gate.float()).to(gate.dtype)
    if up is not None:
        h = h * up
    if block:
        h = hadamard.reference(h, signs, block)
    return quantize_act.reference(h, bits)


def fake(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: str,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_activate_quantize(gate, up, activation, signs, block, bits)
    return quantize_act.fake(gate, bits)


ACTIVATE_QUANTIZE = OpDefinition(
    name="activate_quantize",
    schema="(Tensor gate, Tensor? up, str activation, Tensor? signs, int block, int bits) "
    "-> (Tensor q, Tensor sx)",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient(
        "activate_quantize", "use the activation function and ternc::fake_quantize_act"
    ),
    backward=unreachable_backward,
)
