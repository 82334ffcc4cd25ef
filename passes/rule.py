"""What a rewrite rule is: match, check, rewrite; one rule a file, ordered in
`passes/pipeline.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import fx


@dataclasses.dataclass(frozen=True)
class Skip:
    """Why a rule did not fire, in words a user understands, and the node that stopped it."""

    reason: str
    node: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Match:
    """A place where a rule applies: the root node and the parts that the rule named."""

    root: fx.Node
    parts: dict[str, Any]


class Rule(Protocol):
    """Stateless. `context` is `passes.context.Context`."""

    name: str
    """The rewrite as an equation."""

    def match(self, node: fx.Node) -> Match | None:
        """The match rooted at `node`, or None."""

    def check(self, match: Match, context: Any) -> Skip | None:
        """None if the match may be rewritten, else the reason for the report."""

    def rewrite(self, match: Match, context: Any) -> Skip | None:
        """Edits the graph in place; new nodes carry `meta["ternc_rule"]`. A reason if it cannot."""
