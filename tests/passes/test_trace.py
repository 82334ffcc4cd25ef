"""TERNC_TRACE: what it prints, and that nothing is printed without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ternc


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fitting = nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 8, bias=False)

    def forward(self, x):
        hidden = self.fitting(x)
        return self.lm_head(hidden)


@pytest.fixture
def explained(monkeypatch, capsys):
    """Lines that one explain prints with this value of TERNC_TRACE (None: not set)."""

    def run(value):
        monkeypatch.delenv("TERNC_TRACE", raising=False)
        if value is not None:
            monkeypatch.setenv("TERNC_TRACE", value)
        torch._dynamo.reset()
        with torch.no_grad():
            report = ternc.explain(TwoLayers(), torch.randn(3, 64))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ternc:")]
        return lines, {row.name: row for row in report.rows}

    return run


def test_matched_and_refused_nodes_are_printed_with_their_source(explained):
    lines, rows = explained("1")
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert all(len(line) == 4 for line in cells)
    matched = [line for line in cells if line[3] == "matched"]
    assert any("hidden = self.fitting(x)" in line[2] for line in matched)
    refused, unfused = [line for line in cells if line[3].startswith("refused: ")]
    assert "self.lm_head(hidden)" in refused[2]
    assert "self.fitting(x)" in unfused[2] and "comes from outside" in unfused[3]
    assert rows["lm_head"].reason in refused[3], "the trace gives the report's own reason"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_silent_without_it(explained, value):
    assert explained(value)[0] == []
