"""The verifier names the pass that broke the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ternc.backend import rewrite
from ternc.config import Config
from ternc.passes import pipeline
from ternc.passes.rule import Match
from ternc.passes.verify import GraphInvariantError
from ternc.runtime import ops


class Breaks:
    """A rule that fires on every relu and leaves a graph that is none."""

    name = "relu(x) -> something broken"

    def __init__(self, damage):
        self.damage = damage

    def match(self, node):
        return Match(node, {}) if getattr(node.target, "__name__", "") == "relu" else None

    def check(self, match, context):
        return None

    def rewrite(self, match, context):
        self.damage(match.root)


def use_before_definition(node):
    node.prepend(next(iter(node.users)))


def unused_result(node):
    node.meta["ternc_rule"] = "relu(x) -> something broken"
    node.replace_all_uses_with(node.args[0])


def without_example(node):
    node.meta["ternc_rule"] = "relu(x) -> something broken"
    del node.meta["example_value"]


@pytest.mark.parametrize("damage", [use_before_definition, unused_result, without_example])
def test_the_rule_that_broke_the_graph_is_named(damage, monkeypatch):
    ops.register()
    torch._dynamo.reset()
    monkeypatch.setattr(pipeline, "drop_unused", lambda gm: None)
    monkeypatch.setattr(pipeline, "RULES", (pipeline.RULES[0], Breaks(damage)))
    found = []

    def backend(gm, inputs):
        with pytest.raises(GraphInvariantError, match=r"after relu\(x\) -> something broken"):
            rewrite(gm, inputs, Config(planes=3))
        found.append(gm)
        return gm.forward

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sigmoid())
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(3, 64))
    assert found
