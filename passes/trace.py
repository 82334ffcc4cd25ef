"""TERNC_TRACE=1: one line on stderr for every node that a rule matched or refused."""

from __future__ import annotations

import os
import sys

from torch import fx

from ternc.passes.rule import Skip


def trace(rule: str, node: fx.Node, skip: Skip | None) -> None:
    """Prints the rule, the node, the source line it came from, and what became of it.

    Silent unless the environment variable TERNC_TRACE is set to something other than 0.
    """
    if os.environ.get("TERNC_TRACE", "0") in ("", "0"):
        return
    outcome = "matched"
    if isinstance(skip, Skip):
        at = f" (at {skip.node.name})" if skip.node not in (None, node) else ""
        outcome = f"refused: {skip.reason}{at}"
    print(f"ternc: {rule} | {node.name} | {_source_line(node)} | {outcome}", file=sys.stderr)


def _source_line(node: fx.Node) -> str:
    """The innermost line of the user's code that made the node, without Python's markers."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    return next((line for line in reversed(lines) if line.strip("^~ ")), "source unknown")
