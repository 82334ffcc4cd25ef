"""grouped_linear(x[i], W) -> grouped_linear(q[i], sx[i], W) with q, sx = quantize(x): a token that
several experts meet is quantised once.

Rows are quantised one by one, so gathering them commutes with it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import label_rows, read, read_known, retarget, ternary_users

_VIEWS = ("view", "reshape", torch.reshape)
_SELECTS = ("index_select", torch.index_select)


class GatherRule:
    """Runs before NormRule, which takes the quantisation into the norm where there is one."""

    name = "grouped_linear(x[i], W) -> grouped_linear(quantize(x)[i], W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if call is None or not call.pristine or not call.experts:
            return None
        source, index = _gather(call.x)
        if source is None:
            return None
        return Match(call.x, {"source": source, "index": index, "bits": call.bits})

    def check(self, match: Match, context: Context) -> Skip | None:
        if context.grad_enabled:
            return Skip("gradients do not flow through integers: the rows stay as they are")
        return context.why_not_move(match.root, match.parts["source"], match.parts["index"])

    def rewrite(self, match: Match, context: Context) -> None:
        x, index, bits = match.root, match.parts["index"], match.parts["bits"]
        rows = _unviewed(match.parts["source"])
        quantised = inline(x, torch.ops.ternc.quantize_act.default, rows, bits)
        quantised.meta["ternc_rule"] = self.name

        def gathered(pair: Any, output: int, at: Any) -> Any:
            return operator.getitem(pair, output).flatten(0, -2)[at]

        q, sx = (inline(x, gathered, quantised, output, index) for output in range(2))
        for reader in ternary_users(x):
            if read_known(reader).bits == bits:
                label_rows(reader, "gathered rows")
                retarget(reader, q, sx, self.name)


def _gather(x: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(source [S, K], index [M]) where x is rows of the source."""
    source: Any = arguments(x)[0] if arguments(x) else None
    if x.target is operator.getitem:
        index = arguments(x)[1]
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    elif x.target in _SELECTS and argument(x, 1, "dim") == 0:
        index = argument(x, 2, "index")
    else:
        return None, None
    if not is_tensor(source) or not is_tensor(index):
        return None, None
    whole = example_value(index).dtype in (torch.int64, torch.int32)
    if example_value(source).dim() != 2 or example_value(index).dim() != 1 or not whole:
        return None, None
    return source, index


def _unviewed(source: fx.Node) -> fx.Node:
    """The tensor of the same rows under a view to two dimensions."""
    inner: Any = arguments(source)[0] if source.target in _VIEWS else None
    if not is_tensor(inner):
        return source
    same = str(example_value(inner).shape[-1]) == str(example_value(source).shape[-1])
    return inner if same else source
