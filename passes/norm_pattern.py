"""RMSNorm and LayerNorm in their usual spellings, read as one `Norm`.

rms:   x * rsqrt(mean(x^2) + eps) * gain, with casts where people put them, gain or 1 + gain
layer: F.layer_norm;  F.rms_norm
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.graph import (
    argument,
    arguments,
    example_value,
    is_call,
    is_static_input,
    is_tensor,
)

_LAYER_NORMS = (F.layer_norm, torch.layer_norm)
_MODULE_NORMS = (*_LAYER_NORMS, F.rms_norm, torch.rms_norm)


@dataclasses.dataclass(frozen=True)
class Norm:
    """Arguments of `ternc::norm_quantize`."""

    x: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    kind: str
    eps: float
    gain_offset: float = 0.0
    round_first: bool = False


def read_norm(y: fx.Node) -> Norm | None:
    """The norm over the last dimension that computes y, in the dtype of its input, or None."""
    norm = _module_norm(y) or _spelled_norm(y)
    if norm is None or example_value(norm.x).dtype != example_value(y).dtype:
        return None
    width = example_value(y).shape[-1]
    for tensor in (norm.gain, norm.bias):
        if tensor is not None and tuple(example_value(tensor).shape) != (width,):
            return None
    return norm


def _module_norm(y: fx.Node) -> Norm | None:
    if y.op != "call_function" or y.target not in _MODULE_NORMS:
        return None
    x, shape = arguments(y)[0], argument(y, 1, "normalized_shape")
    if not is_tensor(x) or len(shape) != 1:
        return None
    gain = argument(y, 2, "weight")
    if y.target in _LAYER_NORMS:
        eps = argument(y, 4, "eps", 1e-5)
        return Norm(x, gain, argument(y, 3, "bias"), "layer", eps)
    eps = argument(y, 3, "eps")
    if eps is None:
        eps = _default_epsilon(example_value(x).dtype)
    return Norm(x, gain, None, "rms", eps)


@functools.cache
def _default_epsilon(dtype: torch.dtype) -> float:
    """eps of `F.rms_norm(x, shape)` for this dtype: versions of torch differ, so it is measured."""
    x = 2.0**-10
    y = F.rms_norm(torch.full((1,), x, dtype=dtype), (1,)).item()
    measured = (x / y) ** 2 - x**2
    known = (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return min(known, key=lambda eps: abs(math.log(max(measured, 1e-30) / eps)))


def _spelled_norm(y: fx.Node) -> Norm | None:
    inner, _ = _uncast(y)
    for gain, rest in _operands(inner):
        offset, parameter = _gain(gain)
        if parameter is None:
            continue
        normal, cast = _uncast(rest)
        if found := _rms_core(normal):
            x, eps = found
            rounded = cast is not None and example_value(rest).dtype != torch.float32
            return Norm(x, parameter, None, "rms", eps, offset, rounded)
    if found := _rms_core(inner):
        return Norm(found[0], None, None, "rms", found[1])
    return None


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the operands of a product of two tensors."""
    if (
        not is_call(node, "mul")
        or len(arguments(node)) != 2
        or not all(map(is_tensor, arguments(node)))
    ):
        return []
    a, b = arguments(node)
    return [(a, b), (b, a)]


def _gain(node: fx.Node) -> tuple[float, fx.Node | None]:
    """(0, g) for a parameter g, (1, g) for 1 + g; casts are looked through."""
    node, _ = _uncast(node)
    if is_static_input(node):
        return 0.0, node
    if is_call(node, "add") and len(arguments(node)) == 2:
        for parameter, offset in (arguments(node), arguments(node)[::-1]):
            inner = _uncast(parameter)[0] if isinstance(parameter, fx.Node) else None
            if inner is not None and is_static_input(inner) and isinstance(offset, int | float):
                return float(offset), inner
    return 0.0, None


def _rms_core(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of x * rsqrt(mean(x^2) + eps) or x / sqrt(mean(x^2) + eps)."""
    candidates = []
    if is_call(node, "mul"):
        for x, factor in _operands(node):
            if is_call(factor, "rsqrt") or (
                is_call(factor, "pow") and argument(factor, 1, "exponent") == -0.5
            ):
                candidates.append((x, arguments(factor)[0]))
    if is_call(node, "div") and len(arguments(node)) == 2 and is_call(arguments(node)[1], "sqrt"):
        candidates.append((arguments(node)[0], arguments(node)[1].args[0]))
    for x, under_root in candidates:
        eps = _epsilon_over_mean_square(under_root, x)
        if eps is not None:
            return _uncast(x)[0], eps
    return None


def _epsilon_over_mean_square(node: object, x: fx.Node) -> float | None:
    """eps where `node` is mean(x^2, -1, keepdim=True) + eps."""
    if not isinstance(node, fx.Node) or not is_call(node, "add") or len(arguments(node)) != 2:
        return None
    for mean, eps in (arguments(node), arguments(node)[::-1]):
        if not isinstance(eps, float) or not math.isfinite(eps) or not is_call(mean, "mean"):
            continue
        assert isinstance(mean, fx.Node)
        over = argument(mean, 1, "dim")
        if over not in (-1, [-1], (-1,)) or not argument(mean, 2, "keepdim", False):
            continue
        if _is_square_of(arguments(mean)[0], x):
            return eps
    return None


def _is_square_of(node: object, x: fx.Node) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if is_call(node, "pow"):
        return _alike(arguments(node)[0], x) and argument(node, 1, "exponent") == 2
    if is_call(node, "square"):
        return _alike(arguments(node)[0], x)
    return is_call(node, "mul") and all(_alike(factor, x) for factor in arguments(node))


def _alike(a: object, b: fx.Node) -> bool:
    """The same tensor in the same dtype, cast once or more often."""
    if not is_tensor(a):
        return False
    assert isinstance(a, fx.Node)
    return _uncast(a)[0] is _uncast(b)[0] and example_value(a).dtype == example_value(b).dtype


def _uncast(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(what was cast, the outermost cast), through any number of dtype casts."""
    outermost = None
    while is_call(node, "cast") and is_tensor(arguments(node)[0]):
        outermost = outermost or node
        node = arguments(node)[0]
    return node, outermost
