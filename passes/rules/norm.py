"""linear(s)(norm(x), W) -> linears(norm_quantize(x), W): the norm writes the integers itself, of
its rotated output where the products read hadamard(norm(x)).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import arguments
from ternc.passes.inline import inline
from ternc.passes.norm_pattern import read_norm
from ternc.passes.region import steps, written_outside
from ternc.passes.rotated_input import read_rotation
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import (
    is_quantizer,
    label_rows,
    read,
    read_known,
    replace_outputs,
    retarget,
    ternary_users,
)


class NormRule:
    """Runs after SharedInputRule, so that one call reads the norm."""

    name = "linears(norm(x), W) -> linears(norm_quantize(x), W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if is_quantizer(node):
            x, bits = arguments(node)
        elif call is not None and call.pristine:
            x, bits = call.x, call.bits
        else:
            return None
        rotated = read_rotation(x)
        norm = read_norm(rotated.y)
        if norm is None:
            return None
        return Match(rotated.y, {"norm": norm, "rotated": rotated, "bits": bits})

    def check(self, match: Match, context: Context) -> Skip | None:
        if context.grad_enabled:
            return Skip(
                "gradients do not flow through integers: the norm stays separate", match.root
            )
        norm = match.parts["norm"]
        if written_outside(steps(match.root, norm.x) - {match.root}):
            return Skip("a step of the norm is written in place", match.root)
        return context.why_not_move(norm.x, match.root, match.parts["rotated"].x)

    def rewrite(self, match: Match, context: Context) -> None:
        y, norm, bits = match.root, match.parts["norm"], match.parts["bits"]
        rotated = match.parts["rotated"]
        readers = [user for user in ternary_users(rotated.x) if read_known(user).bits == bits]
        quantizers = [u for u in rotated.x.users if is_quantizer(u) and arguments(u)[1] == bits]
        taken = len(readers) + len(quantizers)
        keep = taken < len(rotated.x.users) or (rotated.x is not y and len(y.users) > 1)
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
            rotated.signs,
            rotated.block,
            bits,
            keep,
        )
        outputs.meta["ternc_rule"] = self.name
        kept, q, sx = (inline(y, operator.getitem, outputs, i) for i in range(3))
        for reader in readers:
            label_rows(reader, f"{norm.kind} norm{rotated.label}")
            retarget(reader, q, sx, self.name)
        for quantizer in quantizers:
            replace_outputs(quantizer, [q, sx])
        if rotated.x is not y and not rotated.x.users:
            y.graph.erase_node(rotated.x)
        if keep:
            y.replace_all_uses_with(kept)
        else:
            y.graph.erase_node(kept)
