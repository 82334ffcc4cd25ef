"""What a fold is: edits of a model's parameters that leave its outputs what they are.

Found in a graph, made on the tensors that were its inputs; no module and no forward changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import fx
from torch.nn import functional as F

from ternc.formats.detect import detect_ternary
from ternc.formats.quantized import Refusal
from ternc.formats.turn import Turn
from ternc.passes.context import Context
from ternc.passes.graph import argument, calling_module, dotted_path, is_static_input, source_of
from ternc.passes.mutation import name_of
from ternc.passes.rule import Skip

BIASES, INPUTS, OUTPUTS, NORMS = range(4)
"""Order of edits: each reads what a later one changes."""

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A new value of one parameter, computed from what is not edited yet."""

    parameter: fx.Node
    """A static input of the graph."""
    step: int
    """BIASES, INPUTS, OUTPUTS or NORMS."""
    change: Change
    """Old value -> new value of the same shape."""


@dataclasses.dataclass
class Fold:
    """One place where an input may change offline: the edits for it, or why there are none."""

    readers: list[fx.Node]
    """Weights (static inputs of the graph) of the products whose inputs it is."""
    note: str
    """For their report rows; where it is refused, the reason."""
    edits: list[Edit]
    """Empty where it is refused."""
    rotates: bool = True
    """The inputs are rotated then; else they are scaled."""


class FoldFinder(Protocol):
    """One kind of fold. Stateless."""

    name: str
    """The rewrite as an equation."""

    def find(self, gm: fx.GraphModule, context: Context) -> list[Fold]:
        """Every place of this kind in a graph in normal form, refused ones included."""


@dataclasses.dataclass(frozen=True)
class Product:
    """F.linear(x, W, b): W is a parameter as it lies there, or its transpose."""

    node: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None

    def edit_inputs(self, change: Turn) -> Edit:
        """`change` of every row of W [N, K]."""
        return Edit(self.weight, INPUTS, _across(change) if self.transposed else change)

    def edit_outputs(self, change: Turn) -> list[Edit]:
        """`change` of every column of W [N, K], and of b [N]."""
        columns = change if self.transposed else _across(change)
        edits = [Edit(self.weight, OUTPUTS, columns)]
        return edits if self.bias is None else [*edits, Edit(self.bias, OUTPUTS, change)]


def _across(change: Turn) -> Change:
    """The change of columns, as one of the rows of the transposed matrix."""
    return lambda matrix: change(matrix.t()).t()


def is_product(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is F.linear


def weight_of(node: fx.Node) -> tuple[object, bool]:
    """What F.linear multiplies with, without a transposition, and whether there was one."""
    weight = argument(node, 1, "weight")
    if isinstance(weight, fx.Node) and weight.target == "t":
        return weight.args[0], True
    return weight, False


def read_product(node: fx.Node, context: Context) -> Product | Skip:
    """The product, or why its weight or bias cannot be edited."""
    (weight, transposed), bias = weight_of(node), argument(node, 2, "bias")
    for tensor in (weight, bias):
        if tensor is not None and (reason := why_fixed(tensor, context)):
            return Skip(f"{where(node)}: {reason}", node)
    assert isinstance(weight, fx.Node)
    return Product(node, weight, transposed, bias)


def where(node: fx.Node) -> str:
    """The layer that a node belongs to, for messages."""
    return calling_module(node) or str(node)


ONE_TOKEN = "the example inputs have one token, which cannot show what moves between tokens"


def one_token(value: torch.Tensor) -> bool:
    """Whether a tensor [..., tokens, width] has a single token."""
    return value.dim() > 2 and int(value.shape[-2]) == 1


def spoken(node: fx.Node) -> str:
    """What a node does and where, for messages."""
    what = f"an input ({node})" if node.op == "placeholder" else f"{name_of(node)} ({node})"
    layer = calling_module(node)
    return f"{what} in {layer}" if layer else what


def why_fixed(tensor: object, context: Context) -> str | None:
    """Why an edit of this tensor would change more than one use of a float parameter."""
    if not isinstance(tensor, fx.Node) or not is_static_input(tensor):
        return "its weight is computed in the forward: there is no parameter to edit"
    if len(tensor.users) > 1:
        name = dotted_path(source_of(tensor))
        return f"{name} is used {len(tensor.users)} times: tied weights stay tied, untie it to fold"
    if tensor in context.tainted:
        return "its parameter is written in place"
    value = context.inputs[tensor.meta["ternc_position"]]
    if value.is_meta or type(value.data) is not torch.Tensor or not value.is_floating_point():
        return "its parameter is no plain float tensor with values"
    if value.dim() == 2 and not isinstance(detect_ternary(value.detach(), None), Refusal):
        return "its weight is ternary by value, which is never rotated"
    return None
