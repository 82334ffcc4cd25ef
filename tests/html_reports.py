"""Reports for the tests of the page: one of a small model, one in which every string attacks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.reporting import GraphNode, Report, Row, Totals

HOSTILE = "</script><b id=injected onclick='x'>&amp;\"'<!--"


def row(name, **changes):
    values = {
        "pattern": "linear",
        "action": "rewritten",
        "reason": "3 planes",
        "format": "ternary x3",
        "shape": (64, 128),
        "bytes_before": 32768,
        "bytes_after": 5440,
        "bytes_at_rest": 5312,
        "bits_per_weight": 5.3125,
        "weight_error": 0.06,
        "kernel": "avx2",
    }
    return Row(name, **{**values, **changes})


def skipped(name, reason):
    return row(name, action="skipped", reason=reason, format="float", weight_error=None)


def hostile_report():
    """A report in which every string is an attack."""
    evil = row(HOSTILE, pattern=HOSTILE, reason=HOSTILE, format=HOSTILE, kernel=HOSTILE)
    nodes = [
        GraphNode(HOSTILE, "placeholder", HOSTILE, (), HOSTILE, HOSTILE),
        GraphNode("b", "call_function", f"torch.{HOSTILE}", (HOSTILE,), HOSTILE, HOSTILE),
    ]
    return Report(
        rows=[evil, row("tied", shared_with=HOSTILE), skipped(HOSTILE + "2", HOSTILE)],
        totals=Totals(weights=40_000, bytes_before=160_000, bytes_after=43_210, bytes_at_rest=4),
        notes=[HOSTILE],
        status=HOSTILE,
        nodes=nodes,
        nodes_before=nodes,
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.side, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        hidden = self.norm(x)
        return x + self.down(F.gelu(self.side(hidden)) * self.up(hidden))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def stack_report():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        return ternc.explain(Stack().eval(), torch.randn(2, 5, 64))
