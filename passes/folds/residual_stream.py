"""A residual stream x -> x Q: embeddings and output projections write x Q, norms lose their gains
to the products that read them, and those products read Q^T.

A stream is all tensors that sums and column-wise steps tie together. Q keeps the vector of ones, so
that RMSNorm and LayerNorm without gain commute with it. Whatever else touches the stream (another
reader, the output of the model, a norm inside the stream as in post-norm models, a tied or ternary
weight) refuses the whole of it, by name.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx
from torch.nn import functional as F

from ternc.formats.rotation import Rotation
from ternc.formats.turn import StreamTurn, Turn
from ternc.passes.context import Context
from ternc.passes.folds.fold import (
    ONE_TOKEN,
    OUTPUTS,
    Edit,
    Fold,
    Product,
    is_product,
    one_token,
    read_product,
    spoken,
    weight_of,
    where,
    why_fixed,
)
from ternc.passes.folds.norm_gain import absorb
from ternc.passes.graph import (
    argument,
    arguments,
    example_value,
    is_call,
    is_static_input,
    is_tensor,
)
from ternc.passes.mutation import is_random, writes_in_place
from ternc.passes.norm_pattern import Norm, read_norm
from ternc.passes.region import evaluate, steps
from ternc.passes.rule import Skip

_TOLERANCE = {torch.float32: 1e-4}
_COARSE = 5e-2
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class ResidualStreamFold:
    """Runs on a graph in normal form."""

    name = "norm(x) W, x + f(x) -> norm(x Q) Q^T W, x Q + f(x) Q"

    def find(self, gm: fx.GraphModule, context: Context) -> list[Fold]:
        norms = {node: norm for node in gm.graph.nodes if (norm := read_norm(node)) is not None}
        folds, seen = [], set()
        for norm in norms.values():
            if norm.x not in seen:
                stream = _Stream(norms, norm.x, context)
                seen |= stream.members
                folds += stream.folds()
        return [fold for fold in folds if fold.readers]


@dataclasses.dataclass(frozen=True)
class _Read:
    """A product that reads a norm of the stream, or the stream itself."""

    node: fx.Node
    norm: fx.Node | None


class _Stream:
    """The tensors that are rotated together, what writes them and what reads them."""

    def __init__(self, norms: dict[fx.Node, Norm], start: fx.Node, context: Context) -> None:
        self._context, self._all_norms = context, norms
        self._norm_of = {step: y for y, norm in norms.items() for step in steps(y, norm.x)}
        self.members: set[fx.Node] = set()
        self.writers: list[fx.Node] = []
        """Products, embeddings and parameters."""
        self.norms: dict[fx.Node, Norm] = {}
        self.open: set[fx.Node] = set()
        """Norms that something else than products reads."""
        self.reads: list[_Read] = []
        self.refused: str | None = None
        self.width = example_value(start).shape[-1]
        self.rotation = Rotation.of(int(self.width), context.config.seed)
        self.turn: Turn = StreamTurn(self.rotation)
        if self.rotation.block == 1:
            self._refuse(f"its width {self.width} is odd")
        if one_token(example_value(start)):
            self._refuse(ONE_TOKEN)
        self._grow(start)

    def folds(self) -> list[Fold]:
        """The edits of the whole stream; else the reason why there are none, and the gains of those
        norms that products alone read.
        """
        edits = [] if self.refused else self._edits()
        if isinstance(edits, Skip):
            self._refuse(edits.reason)
        if self.refused or isinstance(edits, Skip):
            reason = f"the residual stream is not rotated offline: {self.refused}"
            return [Fold(self._weights(), reason, []), *self._gains()]
        label = f"block {self.rotation.block}, seed {self.rotation.seed}"
        note = f"input rotated offline with the residual stream ({label})"
        return [Fold(self._weights(), note, edits)]

    def _gains(self) -> list[Fold]:
        """What is left where the stream stays: nothing is rotated, and channels are of one size."""
        folds = []
        for y, norm in self.norms.items():
            edits = Skip("") if y in self.open else self._absorbed(y, norm, _as_it_is)
            if not isinstance(edits, Skip) and edits:
                note = "gain of its norm folded into its weight"
                folds.append(Fold(self._weights(y), note, edits, rotates=False))
        return folds

    def _weights(self, *norms: fx.Node) -> list[fx.Node]:
        """Weights of all products that read the stream, or these norms of it."""
        reads = [read for read in self.reads if not norms or read.norm in norms]
        weights = [weight_of(read.node)[0] for read in reads]
        return [weight for weight in weights if isinstance(weight, fx.Node)]

    def _refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def _grow(self, start: fx.Node) -> None:
        pending = [start]
        while pending:
            node = pending.pop()
            if node in self.members:
                continue
            self.members.add(node)
            if node in self._context.tainted:
                self._refuse(f"{spoken(node)} is written in place")
            pending += self._sources(node)
            for user in node.users:
                pending += self._readers(node, user)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Members that make this one; a writer of the stream is noted."""
        if is_static_input(node) or is_product(node) or node.target is F.embedding:
            self.writers.append(node)
            return []
        if node in self._all_norms:
            self._refuse(f"the norm in {where(node)} is part of it (post-norm)")
            return []
        found = self._step(node)
        if found is None:
            self._refuse(f"{spoken(node)} is part of it")
        return found or []

    def _readers(self, node: fx.Node, user: fx.Node) -> list[fx.Node]:
        """Members made of this one by one user; a reader of the stream is noted."""
        y = self._norm_of.get(user)
        if y is not None and self._all_norms[y].x is node:
            if y not in self.norms:
                self.norms[y] = self._all_norms[y]
                self._check_inside(y, node)
                self._follow(y, y)
            return []
        if is_product(user) and arguments(user)[0] is node:
            self.reads.append(_Read(user, None))
            return []
        if user.op == "output":
            self._refuse(f"{spoken(node)} leaves the model")
            return []
        if self._step(user) is None:
            self._refuse(f"{spoken(user)} reads it")
            return []
        return [user]

    def _check_inside(self, y: fx.Node, x: fx.Node) -> None:
        """What a norm written out computes on its way is read by nothing else."""
        inside = steps(y, x)
        for step in inside - {y}:
            if any(user not in inside for user in step.users):
                self.open.add(y)
                self._refuse(f"a step of the norm in {where(y)} is read by something else")

    def _follow(self, y: fx.Node, node: fx.Node) -> None:
        """The products that read a norm, through steps that keep columns."""
        for user in node.users:
            if is_product(user) and arguments(user)[0] is node:
                self.reads.append(_Read(user, y))
            elif user.op != "output" and user.all_input_nodes == [node] and self._commutes(user):
                self._follow(y, user)
            else:
                self.open.add(y)
                post = "; a sum of it is post-norm" if is_call(user, "add") else ""
                read = "leaves the model" if user.op == "output" else f"is read by {spoken(user)}"
                self._refuse(f"the output of the norm in {where(y)} {read}{post}")

    def _step(self, node: fx.Node) -> list[fx.Node] | None:
        """Tensors of the stream that `node` is a column-wise step of; None where it is no such."""
        if node.op not in ("call_function", "call_method"):
            return None
        tensors = [source for source in node.all_input_nodes if is_tensor(source)]
        wide = [source for source in tensors if self._is_wide(source)]
        scalars = all(example_value(s).numel() == 1 for s in tensors if s not in wide)
        if not self._is_wide(node) or not wide or not scalars:
            return None
        if is_call(node, "add") or _joins(node):
            return wide if wide == tensors else None
        if is_call(node, "mul") or is_call(node, "div"):
            return wide if _scales(node, wide) else None
        return wide if node.all_input_nodes == wide[:1] and self._commutes(node) else None

    def _is_wide(self, node: fx.Node) -> bool:
        value = example_value(node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False
        return value.dim() > 0 and value.shape[-1] == self.width

    def _commutes(self, node: fx.Node) -> bool:
        """Whether a step of one tensor gives turned rows for turned rows, on random numbers."""
        source = node.all_input_nodes[0]
        if not (self._is_wide(source) and self._is_wide(node)) or is_random(node):
            return False
        if writes_in_place(node):
            return False
        generator = torch.Generator().manual_seed(0)
        dtype = example_value(source).dtype
        value = torch.randn([int(s) for s in example_value(source).shape], generator=generator)
        first = evaluate(source, node, {node}, self.turn(value).to(dtype))
        second = evaluate(source, node, {node}, value.to(dtype))
        if first is None or second is None:
            return False
        tolerance = _TOLERANCE.get(dtype, _COARSE)
        expected = self.turn(second.float())
        return torch.allclose(first.float(), expected, rtol=tolerance, atol=tolerance)

    def _edits(self) -> list[Edit] | Skip:
        edits: list[Edit] = []
        for node in self.writers:
            found = self._written(node)
            if isinstance(found, Skip):
                return found
            edits += found
        for y, norm in self.norms.items():
            found = self._absorbed(y, norm, self.turn)
            if isinstance(found, Skip):
                return found
            edits += found
        products = self._products(None)
        if isinstance(products, Skip):
            return products
        return edits + [product.edit_inputs(self.turn) for product in products]

    def _absorbed(self, y: fx.Node, norm: Norm, turn: Turn) -> list[Edit] | Skip:
        """Edits of a norm and of the products that read it."""
        products = self._products(y)
        if isinstance(products, Skip):
            return products
        found = absorb(norm, products, turn, self._context)
        return Skip(f"{where(y)}: {found.reason}") if isinstance(found, Skip) else found

    def _products(self, norm: fx.Node | None) -> list[Product] | Skip:
        """The products that read a norm, or the stream itself."""
        products = []
        for read in self.reads:
            if read.norm is norm:
                product = read_product(read.node, self._context)
                if isinstance(product, Skip):
                    return product
                products.append(product)
        return products

    def _written(self, node: fx.Node) -> list[Edit] | Skip:
        """Edits of what writes to the stream."""
        if is_product(node):
            product = read_product(node, self._context)
            return product if isinstance(product, Skip) else product.edit_outputs(self.turn)
        table = node if node.op == "placeholder" else argument(node, 1, "weight")
        if node.op != "placeholder" and argument(node, 3, "max_norm") is not None:
            return Skip(f"{where(node)}: its embedding is renormalised in the forward")
        if reason := why_fixed(table, self._context):
            return Skip(f"{where(node)}: {reason}")
        return [Edit(table, OUTPUTS, self.turn)]


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _scales(node: fx.Node, wide: list[fx.Node]) -> bool:
    """One wide tensor times, or by, a number."""
    at = [index for index, operand in enumerate(arguments(node)) if operand in wide]
    return at == [0] or (at == [1] and is_call(node, "mul"))


def _joins(node: fx.Node) -> bool:
    """A concatenation of rows, not of columns."""
    if node.target not in _CONCATENATIONS:
        return False
    dim = argument(node, 1, "dim", 0)
    return isinstance(dim, int) and dim not in (-1, example_value(node).dim() - 1)
