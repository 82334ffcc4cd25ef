"""token_linears1..4(x) -> linear(norm(x), W_i), or act(W_0 y) (* (W_1 y)): one token's product with
what stands before it and behind it, in one call or launch.

The number counts the outputs. 8-bit activations; the norm is that of `ternc::norm_quantize`, the
activation that of `ternc::activate_quantize`, both without a rotation.
"""

from __future__ import annotations

import torch

from ternc.errors import KernelError
from ternc.runtime.ops import activate_quantize, linears, norm_quantize
from ternc.runtime.ops.definition import OpDefinition, refuse_gradient, unreachable_backward

_Tensors = list[torch.Tensor]
_Outputs = torch.Tensor | tuple[torch.Tensor, ...]

BITS = 8


def check_token_linears(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    activation: str,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    layouts: list[int],
) -> None:
    """Raise KernelError for what no kernel takes."""
    if kind:
        norm = (gain, shift, kind, eps, gain_offset, round_first, None, 0, BITS, False)
        norm_quantize.check_norm_quantize(x, *norm)
    packed = (weights, scales, multipliers, biases, out_features, group_sizes)
    linears.check_linears(x, None, *packed, BITS, layouts, x.dtype)
    if not activation:
        return
    if activation not in activate_quantize.ACTIVATIONS:
        known = list(activate_quantize.ACTIVATIONS)
        raise KernelError(f"ternc::token_linears: activation={activation!r}, not one of {known}")
    if len(weights) > 2 or out_features[0] != out_features[-1]:
        raise KernelError(
            f"ternc::token_linears: {activation} of weights with {list(out_features)} rows, not of "
            "one, or of two with as many"
        )


def reference(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    activation: str,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    layouts: list[int],
) -> _Outputs:
    """x [..., K] -> y_i [..., N_i] in x.dtype, or with an activation h [..., N] alone.

    kind: "" for no norm. h: the activation of y_0 in fp32, rounded; of two weights times y_1, and
    rounded again.
    """
    norm = (gain, shift, kind, eps, gain_offset, round_first)
    packed = (weights, scales, multipliers, biases, out_features, group_sizes)
    check_token_linears(x, *norm, activation, *packed, layouts)
    y = norm_quantize.reference(x, *norm, None, 0, BITS, True)[0] if kind else x
    outputs = linears.reference(y, None, *packed, BITS, layouts, x.dtype)
    return joined(outputs, activation)


def joined(outputs: tuple[torch.Tensor, ...], activation: str) -> _Outputs:
    """Products -> what the op returns of them."""
    if activation:
        gate, *up = outputs
        h = activate_quantize.ACTIVATIONS[activation](gate.float()).to(gate.dtype)
        return h * up[0] if up else h
    return outputs[0] if len(outputs) == 1 else outputs


def fake(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    shift: torch.Tensor | None,
    kind: str,
    eps: float,
    gain_offset: float,
    round_first: bool,
    activation: str,
    weights: _Tensors,
    scales: _Tensors,
    multipliers: _Tensors,
    biases: _Tensors,
    out_features: list[int],
    group_sizes: list[int],
    layouts: list[int],
) -> _Outputs:
    norm = (gain, shift, kind, eps, gain_offset, round_first)
    packed = (weights, scales, multipliers, biases, out_features, group_sizes)
    check_token_linears(x, *norm, activation, *packed, layouts)
    outputs = tuple(x.new_empty((*x.shape[:-1], n)) for n in out_features)
    return outputs[0] if activation or len(outputs) == 1 else outputs


TOKEN_LINEARS = tuple(
    OpDefinition(
        name=f"token_linears{count}",
        schema="(Tensor x, Tensor? gain, Tensor? shift, str kind, float eps, float gain_offset, "
        "bool round_first, str activation, Tensor[] weights, Tensor[] scales, "
        "Tensor[] multipliers, Tensor[] biases, int[] out_features, int[] group_sizes, "
        f"int[] layouts) -> {returned}",
        reference=reference,
        fake=fake,
        setup_context=refuse_gradient("token_linears", "use the norm and ternc::linear"),
        backward=unreachable_backward,
    )
    for count, returned in enumerate(
        ("Tensor", *(f"({', '.join(['Tensor'] * n)})" for n in range(2, linears.MAX_WEIGHTS + 1))),
        start=1,
    )
)
