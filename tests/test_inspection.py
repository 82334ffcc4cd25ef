"""What reports say of layers that no compiled graph holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ternc
from ternc.errors import UnsupportedModelError


class Branches(nn.Module):
    """Two linear layers, one of them called."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(128, 128)
        self.b = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor, first: bool = True) -> torch.Tensor:
        return self.a(x) if first else self.b(x)


class Recurrent(nn.Module):
    """Dynamo leaves a frame with an LSTM to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


def actions(report: ternc.Report) -> dict[str, str]:
    return {row.name: row.action for row in report.rows}


def test_a_layer_that_was_not_called_has_a_row():
    model = Branches().eval()
    fast = torch.compile(model, backend="ternc", options={"inner": "eager"})
    x = torch.randn(3, 128)
    with torch.no_grad():
        fast(x)
        report = ternc.report(fast)
        assert actions(report) == {"a": "rewritten", "b": "skipped"}
        assert "in no compiled graph" in report.rows[1].reason
        assert actions(ternc.explain(model, x)) == {"a": "rewritten", "b": "skipped"}
        fast(x, False)
    assert actions(ternc.report(fast)) == {"a": "rewritten", "b": "rewritten"}


def test_code_left_to_python_is_told():
    model = Recurrent().eval()
    fast = torch.compile(model, backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(torch.randn(2, 3, 64))
        assert "left all of it to Python" in str(ternc.report(fast))
        assert actions(ternc.explain(model, torch.randn(2, 3, 64))) == {"head": "skipped"}


def test_excluded_and_tied_layers_have_one_row_each():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 128)
            self.up = nn.Linear(128, 128)
            self.lm_head = nn.Linear(128, 64, bias=False)
            self.lm_head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.up(self.embedding(ids)))

    fast = torch.compile(Tied().eval(), backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(torch.arange(5))
    names = [row.name for row in ternc.report(fast).rows]
    assert sorted(names) == ["lm_head", "up"]


def test_a_report_needs_a_module():
    with pytest.raises(UnsupportedModelError, match="not a function"):
        ternc.report(torch.compile(lambda x: x, backend="ternc"))
