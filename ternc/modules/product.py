"""x, packed layer -> y = ternc::linear(x R, packed W R, b), and its derivatives where torch.func or
forward mode ask for them: no kernel takes part in a transform.

    y + (s - stop(s)),  s = linear(x, W, b)      the kernel's value, the derivatives of s
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from ternc.errors import DifferentiationError, InputError
from ternc.formats.planewise import spread_input
from ternc.runtime.ops.definition import FLOAT_TYPES

if TYPE_CHECKING:
    from ternc.modules.linear import TernaryLinear


def product(layer: TernaryLinear, x: torch.Tensor) -> torch.Tensor:
    """x [..., in_features] -> [..., out_features], in the dtype of x (or autocast's).

    Raises:
        InputError: x has another width, or is no float32, bfloat16 or float16.
    """
    _check(layer, x)
    if not is_transformed():
        return _kernel(layer, x, layer.scale, layer.bias)
    bias = layer.bias
    stopped = None if bias is None else bias.detach()
    y = _kernel(layer, x.detach(), layer.scale.detach(), stopped)
    smooth = _smooth(layer, x.to(y.dtype), None if bias is None else bias.to(y.dtype))
    return y + (smooth - smooth.detach())


def _check(layer: TernaryLinear, x: torch.Tensor) -> None:
    wrong = None
    if x.shape[-1:] != (layer.in_features,):
        wrong = f"{list(x.shape)}; its last dimension must be {layer.in_features}"
    elif x.dtype not in FLOAT_TYPES:
        wrong = f"{x.dtype}; float32, bfloat16 and float16 are taken: convert it, x.float() perhaps"
    if wrong:
        name = f"TernaryLinear({layer.in_features}, {layer.out_features})"
        raise InputError(f"{name}: the input is {wrong}")


def _kernel(
    layer: TernaryLinear, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if layer.rotation is not None:
        x = torch.ops.ternc.hadamard(x, layer.signs, layer.rotation.block)
    if layer.free_planes > 1:
        x = spread_input(x, layer.free_planes, layer.group_size, layer.activation_bits)
    return torch.ops.ternc.linear(
        x,
        layer.packed_weight,
        scale,
        layer.multiplier,
        bias,
        layer.out_features,
        layer.group_size,
        layer.activation_bits or 0,
        layer.layout,
    )


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is active.

    Dynamo enters the transforms that it traces, and guards those around what it traces.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _smooth(layer: TernaryLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product with the dequantised weight, straight through the activation quantiser.

    Raises:
        DifferentiationError: the scales are trained: torch.func does not reach them.
    """
    if layer.scale.requires_grad:
        raise DifferentiationError(
            f"TernaryLinear({layer.in_features}, {layer.out_features}): torch.func and forward "
            "mode differentiate inputs and biases, and its scales require grad; "
            "scale_requires_grad_(False), or use backward()"
        )
    weight = layer.weight.to(x.dtype)
    return F.linear(x, weight.t() if layer.transposed else weight, bias)
