"""cos(x), sin(x) -> the same, in memory: Inductor stores what has to have given strides.

Inductor takes a cosine for as cheap as a product, and computes those of rotary embeddings again
in every layer for every head. 20 to 60 cycles a vector on the CPU; on GPUs the units are idle.
"""

from __future__ import annotations

import torch
import torch._inductor.inductor_prims  # registers the operator
from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import example_value, is_tensor
from ternc.passes.inline import inline
from ternc.passes.mutation import name_of
from ternc.passes.rule import Match, Skip
from ternc.runtime.ops.definition import FLOAT_TYPES

FUNCTIONS = ("cos", "sin")


def stored(x: torch.Tensor) -> torch.Tensor:
    """x with the strides it has."""
    strides = [x.stride(i) for i in range(x.dim())]
    return torch.ops.prims.inductor_force_stride_order.default(x, strides)


class TrigonometryRule:
    """Runs last: nothing reads these nodes but what Inductor compiles."""

    name = "cos(x) -> cos(x) in memory"

    def match(self, node: fx.Node) -> Match | None:
        called = node.op in ("call_function", "call_method") and name_of(node) in FUNCTIONS
        return Match(node, {}) if called and is_tensor(node) and "out" not in node.kwargs else None

    def check(self, match: Match, context: Context) -> Skip | None:
        value = example_value(match.root)
        if context.grad_enabled:
            return Skip("gradients are enabled", match.root)
        if value.device.type != "cpu" or value.dtype not in FLOAT_TYPES or value.dim() == 0:
            return Skip(f"it is {value.dtype} on {value.device.type}", match.root)
        return None

    def rewrite(self, match: Match, context: Context) -> None:
        node = match.root
        users = list(node.users)
        kept = inline(node.next, stored, node)
        kept.meta["ternc_rule"] = self.name
        for user in users:
            user.replace_input_with(node, kept)
