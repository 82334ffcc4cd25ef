"""blend_quantize(w, state), blend_quantize_act(x, state) -> values of the blend of two bit-widths
that a state tensor asks for, gradient straight through: fake_quantize on a schedule.

The state is read at every call: a schedule moves without recompilation. In host memory it also
decides which quantisers are computed; at the end of a schedule that is fake_quantize alone.
"""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.formats.blend import ACTIVATION_BITS, FLOAT, TERNARY, WEIGHT_BITS, blend, values_of
from ternc.runtime.ops import fake_quantize
from ternc.runtime.ops.definition import OpDefinition


def check_state(op: str, state: torch.Tensor, formats: list[float], known: object) -> None:
    """Raise KernelError where `state` is no fp32 [3], or a format has no quantiser."""
    if state.dtype != torch.float32 or tuple(state.shape) != (3,):
        raise KernelError(f"ternc::{op}: state is {state.dtype} {list(state.shape)}, not fp32 [3]")
    if not formats or not set(formats) <= set(known):  # type: ignore[call-overload]
        raise KernelError(f"ternc::{op}: formats {formats} are not among {known}")


def weight_reference(
    w: torch.Tensor, state: torch.Tensor, formats: list[float], planes: int, group_size: int
) -> torch.Tensor:
    """w [N, K] -> values in w.dtype. `formats`: bits that the state may name; 1.58 is ternc::fit.

    state: fp32 [3], source bits, target bits and blend, on any device.
    """
    check_state("blend_quantize", state, formats, WEIGHT_BITS)

    def quantizer(bits: float) -> torch.Tensor:
        if bits == TERNARY:
            return torch.ops.ternc.fake_quantize(w, planes, group_size)
        return values_of(w, bits)

    return _own(blend(formats, state, quantizer), w)


def weight_fake(
    w: torch.Tensor, state: torch.Tensor, formats: list[float], planes: int, group_size: int
) -> torch.Tensor:
    check_state("blend_quantize", state, formats, WEIGHT_BITS)
    return fake_quantize.weight_fake(w, planes, group_size)


def activation_reference(
    x: torch.Tensor, state: torch.Tensor, formats: list[float]
) -> torch.Tensor:
    """x [..., K] -> values in x.dtype, of 8, 4 or 16 (floating point) bits a token."""
    check_state("blend_quantize_act", state, formats, ACTIVATION_BITS)

    def quantizer(bits: float) -> torch.Tensor:
        return x if bits == FLOAT else torch.ops.ternc.fake_quantize_act(x, int(bits))

    return _own(blend(formats, state, quantizer), x)


def activation_fake(x: torch.Tensor, state: torch.Tensor, formats: list[float]) -> torch.Tensor:
    check_state("blend_quantize_act", state, formats, ACTIVATION_BITS)
    return x.new_empty(x.shape)


def _own(values: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """An op returns no argument of its own, and nothing laid out unlike its fake."""
    return values.clone() if values is given else values.contiguous()


BLEND_QUANTIZE = OpDefinition(
    name="blend_quantize",
    schema="(Tensor w, Tensor state, float[] formats, int planes, int group_size) -> Tensor",
    reference=weight_reference,
    fake=weight_fake,
    setup_context=fake_quantize.setup_context,
    backward=fake_quantize.backward,
)

BLEND_QUANTIZE_ACT = OpDefinition(
    name="blend_quantize_act",
    schema="(Tensor x, Tensor state, float[] formats) -> Tensor",
    reference=activation_reference,
    fake=activation_fake,
    setup_context=fake_quantize.setup_context,
    backward=fake_quantize.backward,
)
