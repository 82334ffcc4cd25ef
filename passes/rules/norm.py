"""linear(s)(norm(x), W) -> linears(norm_quantize(x), W): the norm writes the integers itself."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.inline import inline
from ternc.passes.norm_pattern import read_norm
from ternc.passes.region import steps, written_outside
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import read, read_known, retarget, ternary_users


class NormRule:
    """Runs after SharedInputRule, so that one call reads the norm."""

    name = "linears(norm(x), W) -> linears(norm_quantize(x), W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if call is None or not call.pristine:
            return None
        norm = read_norm(call.x)
        return None if norm is None else Match(call.x, {"norm": norm, "bits": call.bits})

    def check(self, match: Match, context: Context) -> Skip | None:
        if context.grad_enabled:
            return Skip(
                "gradients do not flow through integers: the norm stays separate", match.root
            )
        norm = match.parts["norm"]
        if written_outside(steps(match.root, norm.x) - {match.root}):
            return Skip("a step of the norm is written in place", match.root)
        return context.why_not_move(norm.x, match.root)

    def rewrite(self, match: Match, context: Context) -> None:
        y, norm, bits = match.root, match.parts["norm"], match.parts["bits"]
        readers = [user for user in ternary_users(y) if read_known(user).bits == bits]
        keep = len(readers) < len(y.users)
        outputs = inline(
            y,
            torch.ops.ternc.norm_quantize.default,
            norm.x,
            norm.gain,
            norm.bias,
            norm.kind,
            norm.eps,
            norm.gain_offset,
            norm.round_first,
            None,
            0,
            bits,
            keep,
        )
        outputs.meta["ternc_rule"] = self.name
        kept, q, sx = (inline(y, operator.getitem, outputs, i) for i in range(3))
        for reader in readers:
            for site in read_known(reader).sites:
                if site is not None:
                    site.row.pattern = f"{norm.kind} norm + {site.row.pattern}"
            retarget(reader, q, sx, self.name)
        if keep:
            y.replace_all_uses_with(kept)
        else:
            y.graph.erase_node(kept)
