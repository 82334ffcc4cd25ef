"""What a graph must satisfy after every pass; a violation names the pass that caused it."""

from __future__ import annotations

from torch import fx

from ternc.passes.graph import example_value


class GraphInvariantError(AssertionError):
    """A pass left a graph that breaks an invariant: a defect of ternc, not of the model."""


def verify(gm: fx.GraphModule, stage: str) -> None:
    """The graph is well formed; rewritten nodes know their value; outputs of rewrites kept their
    shape.
    """
    try:
        gm.graph.lint()
    except Exception as error:
        raise GraphInvariantError(f"after {stage}: {error}") from error
    for node in gm.graph.nodes:
        if "ternc_rule" not in node.meta:
            continue
        if example_value(node) is None:
            raise GraphInvariantError(f"after {stage}: {node} has no example value")
        if not node.users:
            raise GraphInvariantError(f"after {stage}: {node} was made by a rule and is not used")
