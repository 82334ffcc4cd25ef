"""One spelling of a linear: x @ W.t(), matmul, mm, addmm(b, x, W.t()) -> F.linear(x, W, b).

Only where the right-hand side is a two-dimensional tensor made of static inputs alone: a product
of two activations stays what it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.graph import argument, example_value, is_tensor
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


def spell_linears(gm: fx.GraphModule) -> None:
    """Rewrites every product with a static matrix to `F.linear`, in place."""
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        parts = _matmul_parts(node) or _addmm_parts(node)
        if parts is None:
            continue
        x, matrix, bias = parts
        if isinstance(weight_expression(matrix), Skip) or not isinstance(
            weight_expression(x), Skip
        ):
            continue
        node.replace_all_uses_with(inline(node, _linear, x, matrix, bias))
        gm.graph.erase_node(node)


def _linear(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, matrix.t(), bias)


def _matmul_parts(node: fx.Node) -> tuple[Any, Any, None] | None:
    if node.target not in _MATMUL or len(node.args) != 2 or node.kwargs:
        return None
    x, matrix = node.args
    if not (is_tensor(x) and is_tensor(matrix)) or example_value(matrix).dim() != 2:
        return None
    return x, matrix, None


def _addmm_parts(node: fx.Node) -> tuple[Any, Any, Any] | None:
    if node.target not in _ADDMM or len(node.args) != 3:
        return None
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
        return None
    bias, x, matrix = node.args
    if not all(is_tensor(part) for part in (bias, x, matrix)):
        return None
    # F.linear adds a bias of one dimension; a full matrix is a residual, not a bias.
    if example_value(bias).dim() != 1 or example_value(bias).dtype != example_value(x).dtype:
        return None
    return x, matrix, bias
