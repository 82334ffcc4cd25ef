"""linear(x, W) + r -> linears1(x, W, residual=r): the sum is part of the product's one write."""

from __future__ import annotations

import dataclasses

from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import example_value, is_call, is_tensor
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import read, read_known, write


class ResidualRule:
    """Runs last: the products have their inputs by now."""

    name = "linear(x, W) + r -> linears1(x, W, residual=r)"

    def match(self, node: fx.Node) -> Match | None:
        if not is_call(node, "add") or len(node.args) != 2 or node.kwargs:
            return None
        for output, residual in (node.args, node.args[::-1]):
            product = _product(output)
            if product is not None and is_tensor(residual):
                return Match(node, {"product": product, "output": output, "residual": residual})
        return None

    def check(self, match: Match, context: Context) -> Skip | None:
        output, residual = match.parts["output"], match.parts["residual"]
        if len(output.users) != 1:
            return Skip("the product is read by something else too", output)
        a, b, c = (example_value(node) for node in (output, residual, match.root))
        if not a.dtype == b.dtype == c.dtype or len({str(t.shape) for t in (a, b, c)}) != 1:
            return Skip("the sum broadcasts or changes the dtype", match.root)
        call = read_known(match.parts["product"])
        moved = context.why_not_join(match.parts["product"], match.root)
        return moved or context.why_not_move(residual, output, call.x)

    def rewrite(self, match: Match, context: Context) -> None:
        product, add = match.parts["product"], match.root
        call = dataclasses.replace(read_known(product), residual=match.parts["residual"])
        (output,) = write(call, add, product, self.name)
        for row in call.rows:
            if row is not None:
                row.pattern = f"{row.pattern} + residual"
        add.replace_all_uses_with(output)
        add.graph.erase_node(add)


def _product(output: object) -> fx.Node | None:
    """The ternary product of one weight that computes `output`, without a residual yet."""
    if not isinstance(output, fx.Node):
        return None
    call = read(output)
    if call is None or len(call.weights) != 1 or call.residual is not None or call.experts:
        return None
    return output if call.fusable else None
