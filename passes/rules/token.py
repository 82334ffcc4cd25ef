"""linears(norm_quantize(x), W) -> token_linears(x, W), and with activate_quantize behind it one op
more: of one token, products normalise their own input and write act(gate) * up, or act(gate).

Of one token an op takes about as long to be called as to normalise a row. On CUDA every program of
a product reads all of x: normalising it again in each costs less than a launch that does it once.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import arguments, example_value
from ternc.passes.inline import carry_provenance, inline
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import TernaryCall, read, replace_outputs, several, write
from ternc.runtime.ops.linears import MAX_WEIGHTS
from ternc.runtime.ops.token_linears import BITS

TOKEN_DEVICES = ("cpu", "cuda")
"""Device types with a kernel for `ternc::token_linears1..4`."""


class TokenNormRule:
    """Runs behind all rules: norms and products are as fused as they get."""

    name = "linears(norm_quantize(x), W) -> token_linears(x, W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if call is None or not _takes(call) or call.residual is not None:
            return None
        norm = _source(call, torch.ops.ternc.norm_quantize.default, (1, 2))
        if norm is None or not _one_token(arguments(norm)[0]):
            return None
        x, *_, block, bits, keep = arguments(norm)
        if block or bits != BITS or example_value(x).dtype != call.dtype:
            return None
        return Match(node, {"call": call, "norm": norm, "keep": keep})

    def check(self, match: Match, context: Context) -> Skip | None:
        call, norm = match.parts["call"], match.parts["norm"]
        if match.parts["keep"] or len(call.x.users) > 1 or len(call.sx.users) > 1:
            return Skip("the norm is read by something else too", norm)
        x, gain, bias = arguments(norm)[:3]
        moved = context.why_not_move(x, gain, bias)
        return moved or context.why_not_join(norm, match.root)

    def rewrite(self, match: Match, context: Context) -> None:
        x, *norm = arguments(match.parts["norm"])[:7]
        outputs = _write(match.parts["call"], x, tuple(norm), "", match.root, self.name)
        replace_outputs(match.root, outputs)


class TokenActivationRule:
    """Runs after TokenNormRule."""

    name = "activate_quantize(linears(x, W)) -> token_linears(x, W, activation)"

    def match(self, node: fx.Node) -> Match | None:
        if node.target is not torch.ops.ternc.activate_quantize.default:
            return None
        gate, up, activation, _, block, bits = arguments(node)
        if block or bits != BITS or not _one_token(gate):
            return None
        halves = (gate,) if up is None else (gate, up)
        product = _product(halves)
        if product is None:
            return None
        return Match(node, {"product": product, "activation": activation, "halves": halves})

    def check(self, match: Match, context: Context) -> Skip | None:
        product, halves = match.parts["product"], match.parts["halves"]
        if any(len(half.users) > 1 for half in halves):
            return Skip("gate or up is read by something else too", product)
        for item in match.root.users:
            for reader in item.users:
                call = read(reader)
                if call is None or not _takes(call) or len(call.weights) > 1:
                    return Skip("the integers are read by more than one product", reader)
        return context.why_not_move(*halves) or context.why_not_join(product, match.root)

    def rewrite(self, match: Match, context: Context) -> None:
        node, product = match.root, match.parts["product"]
        call, x, norm = _operands(product)
        (h,) = _write(call, x, norm, match.parts["activation"], node, self.name)
        readers = {reader for item in node.users for reader in item.users}
        for reader in readers:
            down = read(reader)
            assert down is not None
            floating = dataclasses.replace(down, x=h, sx=None)
            replace_outputs(reader, write(floating, reader, reader, self.name))


def _takes(call: TernaryCall) -> bool:
    """Products of 8-bit integers with weights that were packed before compilation."""
    packed = not call.experts and all(site is None for site in call.sites)
    device = example_value(call.weights[0]).device.type
    return packed and call.sx is not None and call.bits == BITS and device in TOKEN_DEVICES


def _one_token(x: Any) -> bool:
    """One row, known when the graph is compiled."""
    sizes = example_value(x).shape[:-1]
    return all(isinstance(size, int) and size == 1 for size in sizes)


def _source(call: TernaryCall, target: Any, items: tuple[int, int]) -> fx.Node | None:
    """The node with this target whose two items are the call's integers and scales."""
    nodes = (call.x, call.sx)
    for node, item in zip(nodes, items, strict=True):
        if node is None or node.target is not operator.getitem or arguments(node)[1] != item:
            return None
    sources = {arguments(node)[0] for node in nodes if node is not None}
    source = sources.pop()
    return source if not sources and source.target is target else None


def _product(halves: tuple[fx.Node, ...]) -> fx.Node | None:
    """The normalising product of one or two weights whose outputs, in order, are the halves."""
    product = halves[0]
    if len(halves) > 1:
        for index, half in enumerate(halves):
            if half.target is not operator.getitem or arguments(half)[1] != index:
                return None
        sources = {arguments(half)[0] for half in halves}
        product = sources.pop()
        if sources:
            return None
    if product.target is not getattr(torch.ops.ternc, f"token_linears{len(halves)}").default:
        return None
    rows = _operands(product)[0].out_features
    plain = not arguments(product)[7]  # without an activation of its own
    return product if plain and len(rows) == len(halves) and rows[0] == rows[-1] else None


def _operands(product: fx.Node) -> tuple[TernaryCall, fx.Node, tuple[Any, ...]]:
    """The call, and x and its norm as they are now: a rule may have replaced x since."""
    x, *norm = arguments(product)[:7]
    return product.meta["ternc_token"], x, tuple(norm)


def _write(
    call: TernaryCall,
    x: fx.Node,
    norm: tuple[Any, ...],
    activation: str,
    before: fx.Node,
    rule: str,
) -> list[fx.Node]:
    """Emits `ternc::token_linears1..4` before a node; returns its outputs."""
    count = 1 if activation else len(call.weights)
    assert count <= MAX_WEIGHTS
    target = getattr(torch.ops.ternc, f"token_linears{count}").default
    _, _, *tensors, _, layouts, _ = several(call, before.graph)
    node = inline(before, target, x, *norm, activation, *tensors, layouts)
    node.meta["ternc_rule"] = rule
    node.meta["ternc_token"] = call
    carry_provenance(before, node)
    if count == 1:
        return [node]
    return [inline(before, lambda all_, i=i: all_[i], node) for i in range(count)]
