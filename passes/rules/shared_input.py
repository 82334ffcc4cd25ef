"""linear(x, A), linear(x, B), ... -> linears(x, [A, B, ...]): x is quantised once.

q/k/v and gate/up projections of any model: no names, no equal sizes, biases or not. The packed
weights stay where they are; nothing is concatenated.
"""

from __future__ import annotations

from torch import fx

from ternc.passes.context import Context
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import TernaryCall, is_linear, read_known, ternary_users, write
from ternc.runtime.ops.linears import MAX_WEIGHTS


class SharedInputRule:
    """Runs after every weight has become a `ternc::linear`."""

    name = "[linear(x, W_i) for i] -> linears(x, [W_i])"

    def match(self, node: fx.Node) -> Match | None:
        if not is_linear(node):
            return None
        call = read_known(node)
        users = [user for user in ternary_users(call.x) if is_linear(user)]
        alike = [user for user in users if read_known(user).bits == call.bits]
        alike.sort()
        if not call.fusable or len(alike) < 2 or alike[0] is not node:
            return None
        return Match(node, {"nodes": alike[:MAX_WEIGHTS]})

    def check(self, match: Match, context: Context) -> Skip | None:
        first = match.root
        for node in match.parts["nodes"]:
            bias = read_known(node).biases[0]
            if bias is not None and bias.op != "placeholder" and not bias < first:
                return Skip("a bias is computed after the first product of the same input", node)
        last = match.parts["nodes"][-1]
        return context.why_not_join(first, last) or context.why_not_move(read_known(first).x)

    def rewrite(self, match: Match, context: Context) -> None:
        nodes = match.parts["nodes"]
        outputs = write(
            _joined([read_known(node) for node in nodes]), match.root, match.root, self.name
        )
        for node, output in zip(nodes, outputs, strict=True):
            node.replace_all_uses_with(output)
            node.graph.erase_node(node)


def _joined(calls: list[TernaryCall]) -> TernaryCall:
    first = calls[0]
    rows = [row for call in calls for row in call.rows]
    names = [row.name for row in rows if row is not None]
    for row in rows:
        if row is not None:
            others = ", ".join(name for name in names if name != row.name)
            row.pattern = f"{row.pattern}; input shared with {others}"
    return TernaryCall(
        x=first.x,
        sx=None,
        weights=[weight for call in calls for weight in call.weights],
        scales=[scale for call in calls for scale in call.scales],
        multipliers=[multiplier for call in calls for multiplier in call.multipliers],
        biases=[bias for call in calls for bias in call.biases],
        residual=None,
        out_features=[rows for call in calls for rows in call.out_features],
        group_sizes=[size for call in calls for size in call.group_sizes],
        bits=first.bits,
        layouts=[layout for call in calls for layout in call.layouts],
        dtype=first.dtype,
        sites=[site for call in calls for site in call.sites],
        rows=rows,
    )
