"""norm_quantize(x) -> (y, q, sx): RMSNorm or LayerNorm, then per-token integers, in one pass.

rms:   n = x / sqrt(mean(x^2) + eps);            y = n * gain (+ bias)
layer: n = (x - mean(x)) / sqrt(var(x) + eps);   y = n * gain (+ bias)
then, where block > 0, the block Hadamard transform of y (with signs), and quantize_act.
"""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.runtime.ops import hadamard, quantize_act
from ternc.runtime.ops.definition import OpDefinition, refuse_gradient, unreachable_backward

KINDS = ("rms", "layer")


def check_norm_quantize(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
    keep: bool,
) -> None:
    """Raise KernelError for what no kernel takes."""
    quantize_act.check_quantize_act(x, bits)
    if kind not in KINDS:
        raise KernelError(f"ternc::norm_quantize: kind={kind!r}, not one of {KINDS}")
    for name, tensor in (("gain", gain), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise KernelError(
                f"ternc::norm_quantize: {name} is {list(tensor.shape)}, not [{x.shape[-1]}]"
            )
    if block:
        hadamard.check_hadamard(x, signs, block)


def reference(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] -> y [..., K] in x.dtype (empty [0] unless `keep`), q int8 [..., K], sx [..., 1].

    Statistics in float64, rounded to fp32 once: no order of sums moves them. gain [K] (plus
    gain_offset, in fp32) and bias [K] of any float dtype. round_first: n is rounded to x.dtype
    before the gain, and the product again; else one rounding of y to x.dtype at the end. q may
    differ by 1 from another kernel's in at most 0.1 % of elements. Kernels on CUDA square in fp32:
    there, values over 1e19, or under 1e-19 with an eps of 0, are beyond the range of a norm.
    """
    check_norm_quantize(
        x, gain, bias, kind, eps, gain_offset, round_first, signs, block, bits, keep
    )
    n = x.float()
    if kind == "layer":
        n = n - n.mean(-1, keepdim=True, dtype=torch.float64).float()
    n = n * torch.rsqrt(n.double().square().mean(-1, keepdim=True) + eps).float()
    if round_first:
        n = n.to(x.dtype).float()
    if gain is not None:
        n = n * (gain.float() + gain_offset)
    if bias is not None:
        n = n + bias.float()
    y = n.to(x.dtype)
    rotated = hadamard.reference(y, signs, block) if block else y
    q, sx = quantize_act.reference(rotated, bits)
    return (y if keep else y.new_empty(0)), q, sx


def fake(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    signs: torch.Tensor | None,
    block: int,
    bits: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_norm_quantize(
        x, gain, bias, kind, eps, gain_offset, round_first, signs, block, bits, keep
    )
    q, sx = quantize_act.fake(x, bits)
    return x.new_empty(x.shape if keep else (0,)), q, sx


NORM_QUANTIZE = OpDefinition(
    name="norm_quantize",
    schema="(Tensor x, Tensor? gain, Tensor? bias, str kind, float eps, float gain_offset, "
    "bool round_first, Tensor? signs, int block, int bits, bool keep) "
    "-> (Tensor y, Tensor q, Tensor sx)",
    reference=reference,
    fake=fake,
    setup_context=refuse_gradient("norm_quantize", "use the norm and ternc::fake_quantize_act"),
    backward=unreachable_backward,
)
