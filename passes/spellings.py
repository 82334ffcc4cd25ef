"""One spelling of a linear: x @ W.t(), matmul, mm, addmm(b, x, W.t()), einsum("...k,nk->...n"),
convolutions of one tap -> F.linear(x, W, b).

Only where the right-hand side is a two-dimensional tensor made of static inputs alone: a product
of two activations stays what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.rule import Skip
from ternc.passes.weight_expression import weight_expression

_MATMUL = {
    torch.matmul,
    torch.mm,
    operator.matmul,
    torch.Tensor.matmul,
    "matmul",
    "mm",
    "__matmul__",
}
_ADDMM = {torch.addmm, "addmm"}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


Build = Callable[..., torch.Tensor]
Found = tuple[tuple[fx.Node, fx.Node, fx.Node | None], Build]
"""(x, weight or matrix, bias) and the code that computes the same through `F.linear`."""


def spell_linears(gm: fx.GraphModule) -> None:
    """Rewrites every product with a static matrix to `F.linear`, in place."""
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        found = _matmul(node) or _addmm(node) or _einsum(node) or _pointwise_convolution(node)
        if found is None:
            continue
        (x, weight, bias), build = found
        static_x = not isinstance(weight_expression(x), Skip)
        if static_x or isinstance(weight_expression(weight), Skip):
            continue
        node.replace_all_uses_with(inline(node, build, x, weight, bias))
        gm.graph.erase_node(node)


def _linear(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, matrix.t(), bias)


def _matmul(node: fx.Node) -> Found | None:
    if node.target not in _MATMUL or len(node.args) != 2 or node.kwargs:
        return None
    x, matrix = arguments(node)
    if not (is_tensor(x) and is_tensor(matrix)) or example_value(matrix).dim() != 2:
        return None
    return (x, matrix, None), _linear


def _addmm(node: fx.Node) -> Found | None:
    if node.target not in _ADDMM or len(node.args) != 3 or "out" in node.kwargs:
        return None
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
        return None
    bias, x, matrix = arguments(node)
    if not all(is_tensor(part) for part in (bias, x, matrix)):
        return None
    # F.linear adds a bias of one dimension; a full matrix is a residual, not a bias.
    if example_value(bias).dim() != 1 or example_value(bias).dtype != example_value(x).dtype:
        return None
    return (x, matrix, bias), _linear


def _einsum(node: fx.Node) -> Found | None:
    """einsum("...k,nk->...n", x, W) and "...k,kn->...n", with any letters."""
    if node.target is not torch.einsum or len(node.args) != 3:
        return None
    equation, x, weight = arguments(node)
    if not (is_tensor(x) and is_tensor(weight)) or example_value(weight).dim() != 2:
        return None
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if not arrow or len(second) != 2 or first[-1:] not in set(second) or "." in second:
        return None
    contracted = first[-1]
    kept = second.replace(contracted, "", 1)
    lead = first[:-1]
    if not kept or output != lead + kept or contracted in lead or kept in first:
        return None
    transposed = second.endswith(contracted)
    return (x, weight, None), F.linear if transposed else _linear


def _pointwise_convolution(node: fx.Node) -> Found | None:
    """A convolution of one tap, stride 1, no padding, one group: a linear over the channels."""
    if node.target not in _CONVOLUTIONS:
        return None
    x, weight, bias = (
        argument(node, i, name) for i, name in enumerate(("input", "weight", "bias"))
    )
    if not (is_tensor(x) and is_tensor(weight)):
        return None
    spatial = example_value(weight).dim() - 2
    if any(size != 1 for size in example_value(weight).shape[2:]):
        return None
    if example_value(x).dim() != spatial + 2 or argument(node, 6, "groups", 1) != 1:
        return None
    for index, name, plain in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)):
        value = argument(node, index, name, plain)
        sizes = value if isinstance(value, tuple | list) else (value,)
        if any(size != plain for size in sizes):
            return None
    return (x, weight, bias), _over_channels


def _over_channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y = F.linear(x.movedim(1, -1), weight.flatten(1), bias)
    return y.movedim(-1, 1).contiguous()
