"""linears(hadamard(x), W) -> linears(activate_quantize(x, signs, block), W): a rotation that no
norm and no activation took in is one op with the quantisation.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.inline import inline
from ternc.passes.rotated_input import read_rotation
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import label_rows, read, read_known, retarget, ternary_users


class RotationRule:
    """Runs after NormRule and ActivationRule: attention outputs, model inputs."""

    name = "linears(hadamard(x), W) -> linears(quantize(hadamard(x)), W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if call is None or not call.pristine:
            return None
        rotated = read_rotation(call.x)
        return Match(call.x, {"rotated": rotated, "bits": call.bits}) if rotated.block else None

    def check(self, match: Match, context: Context) -> Skip | None:
        if context.grad_enabled:
            return Skip(
                "gradients do not flow through integers: the rotation stays separate", match.root
            )
        return context.why_not_move(match.parts["rotated"].y, match.root)

    def rewrite(self, match: Match, context: Context) -> None:
        h, bits = match.root, match.parts["bits"]
        rotated = match.parts["rotated"]
        outputs = inline(
            h,
            torch.ops.ternc.activate_quantize.default,
            rotated.y,
            None,
            "none",
            rotated.signs,
            rotated.block,
            bits,
        )
        outputs.meta["ternc_rule"] = self.name
        q, sx = (inline(h, operator.getitem, outputs, i) for i in range(2))
        for reader in ternary_users(h):
            if read_known(reader).bits == bits:
                label_rows(reader, "hadamard")
                retarget(reader, q, sx, self.name)
