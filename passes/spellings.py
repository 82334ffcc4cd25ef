"""One spelling of a linear: x @ W.t(), matmul, mm, addmm(b, x, W.t()), einsum("bsd,hkd->bshk"),
convolutions of one tap -> F.linear(x, W, b); matmul and einsum with a stack [E, K, N] -> bmm.

Only where the right-hand side is made of static inputs alone: a product of two activations stays
what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.einsum import read_einsum
from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.rule import Skip
from ternc.passes.trace import trace
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
        read = next((read for ops, read in _READERS if _is_one_of(node, ops)), None)
        if read is None or not _has_static_operand(node):
            continue
        found = read(node)
        if found is None:
            continue
        skip = found if isinstance(found, Skip) else _why_not_one_weight(*found[0])
        trace("a product with a static matrix -> F.linear(x, W, b)", node, skip)
        if isinstance(found, Skip) or skip is not None:
            continue
        operands, build = found
        node.replace_all_uses_with(inline(node, build, *operands))
        gm.graph.erase_node(node)


def _is_one_of(node: fx.Node, ops: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in ops


def _has_static_operand(node: fx.Node) -> bool:
    """Whether a tensor of at least two dimensions comes from parameters and buffers alone."""
    return any(
        is_tensor(operand)
        and example_value(operand).dim() >= 2
        and not isinstance(weight_expression(operand), Skip)
        for operand in node.all_input_nodes
    )


def _why_not_one_weight(x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Skip | None:
    if not isinstance(weight_expression(x), Skip):
        return Skip("both operands are made of parameters alone", x)
    expression = weight_expression(weight)
    return expression if isinstance(expression, Skip) else None


def _linear(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, matrix.t(), bias)


def _from_the_left(x: torch.Tensor, matrix: torch.Tensor, bias: None) -> torch.Tensor:
    return F.linear(x.transpose(-2, -1), matrix).transpose(-2, -1)


def _bmm(x: torch.Tensor, stack: torch.Tensor, bias: None) -> torch.Tensor:
    return torch.bmm(x, stack)


def _matmul(node: fx.Node) -> Found | Skip | None:
    if len(node.args) != 2 or node.kwargs:
        return Skip("the product has arguments beside its two operands", node)
    x, matrix = arguments(node)
    if not (is_tensor(x) and is_tensor(matrix)):
        return None
    dims = example_value(x).dim(), example_value(matrix).dim()
    if isinstance(weight_expression(matrix), Skip) and dims[0] == 2 <= dims[1]:
        return (matrix, x, None), _from_the_left
    if dims == (3, 3) and str(example_value(x).shape[0]) == str(example_value(matrix).shape[0]):
        return (x, matrix, None), _bmm
    if dims[1] != 2:
        return Skip(f"the right operand has {dims[1]} dimensions, a weight has 2", matrix)
    return (x, matrix, None), _linear


def _addmm(node: fx.Node) -> Found | Skip | None:
    if "out" in node.kwargs:
        return Skip("the product is written to another tensor (out=)", node)
    bias, x, matrix = (argument(node, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
        return Skip("beta or alpha of addmm is not 1", node)
    if not all(is_tensor(part) for part in (bias, x, matrix)):
        return None
    # F.linear adds a bias of one dimension; a full matrix is a residual, not a bias.
    if example_value(bias).dim() != 1:
        return Skip("what addmm adds is a matrix, not a bias", bias)
    if example_value(bias).dtype != example_value(x).dtype:
        return Skip("the bias has another dtype than the input", bias)
    return (x, matrix, bias), _linear


def _einsum(node: fx.Node) -> Found | Skip | None:
    equation, *operands = arguments(node)
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(map(is_tensor, operands)):
        return Skip("an einsum that is not of two tensors", node)
    swapped = isinstance(weight_expression(operands[1]), Skip)
    x, weight = operands[::-1] if swapped else operands
    ranks = example_value(x).dim(), example_value(weight).dim()
    build = read_einsum(equation, ranks, swapped)
    return Skip(build, node) if isinstance(build, str) else ((x, weight, None), build)


def _pointwise_convolution(node: fx.Node) -> Found | Skip | None:
    """A convolution of one tap, stride 1, no padding, one group: a linear over the channels."""
    x, weight, bias = (
        argument(node, i, name) for i, name in enumerate(("input", "weight", "bias"))
    )
    if not (is_tensor(x) and is_tensor(weight)):
        return None
    taps = list(example_value(weight).shape[2:])
    if any(size != 1 for size in taps):
        return Skip(f"a convolution of {taps} taps is no linear over the channels", node)
    if argument(node, 6, "groups", 1) != 1:
        return Skip("a convolution in groups is no one linear over the channels", node)
    if example_value(x).dim() != len(taps) + 2:
        return Skip("the input of the convolution has no batch dimension", x)
    for index, name, plain in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)):
        value = argument(node, index, name, plain)
        sizes = value if isinstance(value, tuple | list) else (value,)
        if any(size != plain for size in sizes):
            return Skip(f"{name}={value!r} of the convolution is not {plain}", node)
    return (x, weight, bias), _over_channels


def _over_channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y = F.linear(x.movedim(1, -1), weight.flatten(1), bias)
    return y.movedim(-1, 1).contiguous()


_READERS: tuple[tuple[set[Any], Callable[[fx.Node], Found | Skip | None]], ...] = (
    (_MATMUL, _matmul),
    (_ADDMM, _addmm),
    ({torch.einsum}, _einsum),
    (_CONVOLUTIONS, _pointwise_convolution),
)
