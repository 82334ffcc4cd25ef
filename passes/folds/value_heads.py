"""attention(q, k, v) o -> attention(q, k, v R) R^T o, per head: R goes into the weights of v and o.

Attention weights mix the rows of v and leave its columns alone, so a rotation of every head of v
arrives unchanged at the output projection. What lies between the projection and attention, and
between attention and the output projection, must only move columns: that is seen by running those
nodes on numbered columns and on random ones.
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.nn import functional as F

from ternc.formats.rotation import Rotation
from ternc.formats.turn import HeadTurn, Turn
from ternc.passes.context import Context
from ternc.passes.folds.fold import (
    ONE_TOKEN,
    Fold,
    Product,
    is_product,
    one_token,
    read_product,
    spoken,
    weight_of,
    where,
)
from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.mutation import shares_storage
from ternc.passes.region import ancestors, between, evaluate
from ternc.passes.rule import Skip

_MAX_STEPS = 16
"""Nodes between attention and the output projection."""
_TOLERANCE = 1e-4
_CHANGED = "the values are changed between their projection and attention"

Heads = tuple[tuple[int, ...], ...]


class ValueHeadsFold:
    """Runs on a graph whose attention is F.scaled_dot_product_attention."""

    name = "attention(q, k, v) o -> attention(q, k, v R) R^T o"

    def find(self, gm: fx.GraphModule, context: Context) -> list[Fold]:
        attentions = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        return [fold for node in attentions if (fold := _fold(node, context)) is not None]


def _fold(attention: fx.Node, context: Context) -> Fold | None:
    """The fold of one attention; None where no product reads its output."""
    after = _path_after(attention)
    if isinstance(after, Skip):
        return None
    output, between_them = after
    readers = [w for w in (weight_of(output)[0],) if isinstance(w, fx.Node)]
    size = example_value(attention).shape[-1]
    rotation = Rotation.of(int(size), context.config.seed)
    found = _found(attention, output, between_them, rotation, context)
    if isinstance(found, Skip):
        reason = f"v and {where(output)} are not rotated offline: {found.reason}"
        return Fold(readers, reason, [])
    value, into, product, out_of = found
    edits = [*value.edit_outputs(into), product.edit_inputs(out_of)]
    note = (
        f"input rotated offline with {where(value.node)}, heads of {size} "
        f"(block {rotation.block}, seed {rotation.seed})"
    )
    return Fold(readers, note, edits)


def _found(
    attention: fx.Node,
    output: fx.Node,
    after: set[fx.Node],
    rotation: Rotation,
    context: Context,
) -> tuple[Product, HeadTurn, Product, HeadTurn] | Skip:
    """The value projection with its turn, and the output projection with its."""
    if rotation.block == 1:
        return Skip("the width of its heads is odd", attention)
    v = argument(attention, 2, "value")
    if one_token(example_value(attention)):
        return Skip(ONE_TOKEN, attention)
    source = next((node for node in ancestors(v) if is_product(node)), None)
    inside = None if source is None else (set() if source is v else between(source, v))
    if source is None or inside is None:
        return Skip("its values are not one projection, reshaped", attention)
    heads = _value_heads(source, v, inside)
    if isinstance(heads, Skip):
        return heads
    into = HeadTurn(rotation, heads)
    if not _agree(source, v, inside, into, rotation.rotate):
        return Skip(_CHANGED, v)
    if (reader := _other_reader(source, attention, inside, heads)) is not None:
        return Skip(f"the values are also read by {spoken(reader)}", reader)
    heads = _output_heads(attention, arguments(output)[0], after)
    if isinstance(heads, Skip):
        return heads
    out_of = HeadTurn(rotation, heads)
    if not _agree(attention, arguments(output)[0], after, rotation.rotate, out_of):
        return Skip("the output of attention is changed before it is projected", attention)
    value, product = read_product(source, context), read_product(output, context)
    for read in (value, product):
        if isinstance(read, Skip):
            return read
    assert isinstance(value, Product) and isinstance(product, Product)
    return value, into, product, out_of


def _path_after(attention: fx.Node) -> tuple[fx.Node, set[fx.Node]] | Skip:
    """The one product that reads the output of attention, and the nodes on the way to it."""
    node = attention
    found: set[fx.Node] = set()
    while len(found) < _MAX_STEPS:
        if len(node.users) != 1:
            return Skip("the output of attention is read by several", node)
        user = next(iter(node.users))
        if is_product(user) and arguments(user)[0] is node:
            return user, found
        if user.op not in ("call_function", "call_method") or user.all_input_nodes != [node]:
            return Skip(f"the output of attention is read by {user}", node)
        found.add(user)
        node = user
    return Skip("no product reads the output of attention", node)


def _run(source: fx.Node, x: fx.Node, inside: set[fx.Node], value: torch.Tensor) -> object:
    """x for source = value, through the nodes between them."""
    return value if source is x else evaluate(source, x, inside, value)


def _value_heads(source: fx.Node, v: fx.Node, inside: set[fx.Node]) -> Heads | Skip:
    """Columns of the projection's output that the heads of v hold."""
    shape = [int(size) for size in example_value(source).shape]
    # Halves: no usual function leaves x.5 what it is.
    numbered = (torch.arange(shape[-1], dtype=torch.float64) + 0.5).expand(shape)
    moved = _run(source, v, inside, numbered)
    if not isinstance(moved, torch.Tensor):
        return Skip("the values cannot be followed from their projection", v)
    heads = moved.reshape(-1, moved.shape[-1]).unique(dim=0)
    columns = heads.flatten()
    if not (columns.remainder(1) == 0.5).all():
        return Skip(_CHANGED, v)
    if len(columns.unique()) != len(columns):
        return Skip("heads of the values overlap", v)
    return _as_heads(heads)


def _output_heads(attention: fx.Node, x: fx.Node, inside: set[fx.Node]) -> Heads | Skip:
    """Columns of the output projection's input that hold the heads of attention's output."""
    shape = [int(size) for size in example_value(attention).shape]
    size = shape[-1]
    numbered = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    moved = _run(attention, x, inside, numbered)
    if not isinstance(moved, torch.Tensor) or moved.numel() != numbered.numel():
        return Skip("the output of attention cannot be followed to its projection", attention)
    numbers = moved.reshape(-1, moved.shape[-1])
    head, dimension = numbers.div(size, rounding_mode="floor"), numbers.remainder(size)
    first = torch.argsort(numbers[0]).view(-1, size)  # columns by head, then by dimension
    in_order = dimension[:, first] == torch.arange(size, dtype=torch.float64)
    together = head[:, first] == head[:, first[:, :1]]
    if not (in_order.all() and together.all()):
        return Skip("the output of attention is not laid out head by head", attention)
    return _as_heads(first)


def _as_heads(columns: torch.Tensor) -> Heads:
    return tuple(tuple(int(column) for column in head) for head in columns.tolist())


def _agree(source: fx.Node, x: fx.Node, inside: set[fx.Node], before: Turn, after: Turn) -> bool:
    """Whether turning the source is turning x, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    shape = [int(size) for size in example_value(source).shape]
    value = torch.randn(shape, generator=generator)
    first = _run(source, x, inside, before(value))
    second = _run(source, x, inside, value)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return torch.allclose(first, after(second), rtol=_TOLERANCE, atol=_TOLERANCE)


def _other_reader(
    source: fx.Node, attention: fx.Node, inside: set[fx.Node], heads: Heads
) -> fx.Node | None:
    """A node beside attention that reads columns of the heads."""
    rotated = torch.tensor(heads, dtype=torch.float64)
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user is attention:
                if _reads_twice(user, node):
                    return user
            elif user in inside:
                pending.append(user)
            elif not shares_storage(user) or user.all_input_nodes != [node]:
                return user
            elif not is_tensor(user) or _holds(source, user, rotated):
                pending.append(user)
    return None


def _reads_twice(attention: fx.Node, v: fx.Node) -> bool:
    return sum(argument is v for argument in arguments(attention)) != 1


def _holds(source: fx.Node, view: fx.Node, rotated: torch.Tensor) -> bool:
    """Whether a view of the projection's output holds any of these columns."""
    inside = between(source, view)
    if inside is None:
        return True
    shape = [int(size) for size in example_value(source).shape]
    moved = evaluate(
        source, view, inside, torch.arange(shape[-1], dtype=torch.float64).expand(shape)
    )
    return moved is None or bool(torch.isin(moved, rotated).any())
