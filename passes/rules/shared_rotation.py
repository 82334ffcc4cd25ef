"""hadamard(x, s, b), hadamard(x, s, b), ... -> one: the layers of one input share its rotation.

Packed layers that are rotated alike hold one tensor of signs, so that the same rotation is the
same input of the graph, and a guard of Dynamo's keeps it so.
"""

from __future__ import annotations

from torch import fx

from ternc.passes.context import Context
from ternc.passes.rotated_input import is_hadamard
from ternc.passes.rule import Match, Skip


class SharedRotationRule:
    """Runs before SharedInputRule, which joins the products of one input."""

    name = "[hadamard(x, s, b) for i] -> hadamard(x, s, b)"

    def match(self, node: fx.Node) -> Match | None:
        if not is_hadamard(node):
            return None
        source = node.all_input_nodes[0]
        alike = [user for user in source.users if is_hadamard(user) and user.args == node.args]
        alike.sort()
        return Match(node, {"nodes": alike}) if len(alike) > 1 and alike[0] is node else None

    def check(self, match: Match, context: Context) -> Skip | None:
        first, last = match.parts["nodes"][0], match.parts["nodes"][-1]
        written = context.why_not_move(first.all_input_nodes[0], *match.parts["nodes"])
        return context.why_not_join(first, last) or written

    def rewrite(self, match: Match, context: Context) -> None:
        for node in match.parts["nodes"][1:]:
            node.replace_all_uses_with(match.root)
            node.graph.erase_node(node)
