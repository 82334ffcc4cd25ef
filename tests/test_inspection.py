"""What reports say of layers that no compiled graph holds."""

from __future__ import annotations

import gc
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import ternc
from ternc.config import DEFAULT_EXCLUDE
from ternc.errors import UnsupportedModelError


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


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


class Broken(nn.Module):
    """Two graphs with code in between that Dynamo leaves to Python; the rest after both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor, twice: bool = True) -> torch.Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x) if twice else x


def test_graph_breaks_are_told_with_their_reason():
    model, x = Broken().eval(), torch.randn(3, 128)
    with torch.no_grad():
        fast = torch.compile(model, backend="ternc", options={"inner": "eager"})
        fast(x)
        fast(torch.randn(5, 128))  # compiled anew with other shapes: as many parts as before
        split = [note for note in ternc.report(fast).notes if "Dynamo" in note]
        assert split == [note for note in ternc.explain(model, x).notes if "Dynamo" in note]
        assert len(split) == 1 and split[0].startswith("Dynamo split the model into 2 graphs: Call")
        assert "graph_break()` (test_inspection.py:" in split[0] and "in forward)" in split[0]
        (note,) = (n for n in ternc.explain(model, x, False).notes if "Dynamo" in n)
        assert note.startswith("Dynamo left the rest to Python: ")
        whole = torch.compile(Branches().eval(), backend="ternc", options={"inner": "eager"})
        whole(x)
        assert not any("Dynamo" in note for note in ternc.report(whole).notes)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(x))


@pytest.mark.parametrize("trained", [False, True])
def test_blocks_compiled_one_by_one_are_told_apart(trained):
    """One graph runs for all of them, and names what it reads from the block on."""
    model, x = nn.Sequential(*(Block() for _ in range(3))).eval(), torch.randn(3, 128)
    model.requires_grad_(trained)
    for block in model:
        block.compile(backend="ternc", options={"inner": "eager", "planes": 1})
    model(x)
    report = ternc.report(model)
    assert [row.name for row in report.rows] == ["0.up", "1.up", "2.up"]
    if trained:
        assert [site.name for site in ternc.sites(model)] == ["0.up", "1.up", "2.up"]
        return
    assert [row.kernel is not None for row in report.rows] == [True] * 3
    assert len({row.weight_error for row in report.rows}) == 3
    assert report.totals.bytes_before == 3 * 4 * (128 * 128 + 128)
    assert report.totals.bytes_after < report.totals.bytes_before / 4


def test_a_part_of_what_was_compiled_is_told_by_its_own_names():
    model = nn.Sequential(OrderedDict(a=Block(), b=nn.Sequential(Block(), Block()))).eval()
    fast = torch.compile(model, backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(torch.randn(3, 128))
    part = ternc.report(model.b)
    assert [row.name for row in part.rows] == ["0.up", "1.up"]
    assert part.totals.bytes_before == 2 * 4 * (128 * 128 + 128)
    assert [row.name for row in ternc.report(fast).rows] == ["a.up", "b.0.up", "b.1.up"]


def test_globs_without_a_match_are_told():
    """By quantize, by the backend and by explain; default globs without a match are not."""
    globs = {"exclude": (*DEFAULT_EXCLUDE, "a", "inside"), "include": ("c",), "int8": ("*.head",)}
    model = nn.Sequential(OrderedDict(a=nn.Linear(128, 128), inside=Broken())).eval()
    q = ternc.quantize(model, ternc.Config(**globs))
    fast = torch.compile(model, backend="ternc", options={"inner": "eager", **globs})
    with torch.no_grad():
        fast(torch.randn(3, 128))
        explained = ternc.explain(model, torch.randn(3, 128), config=ternc.Config(**globs))
    for report in (ternc.report(q), ternc.report(fast), explained):
        told = [note for note in report.notes if "matches no layer" in note]
        assert [note.partition(" matches")[0] for note in told] == [
            "exclude='inside'", "include='c'", "int8='*.head'"
        ]  # fmt: skip
        assert "'inside.*' would match some" in told[0] and "would" not in told[1]
    assert not ternc.report(ternc.quantize(model)).notes


def test_a_trained_weight_is_counted_once():
    model = Branches()
    fast, x = torch.compile(model, backend="ternc", options={"inner": "eager"}), torch.randn(3, 128)
    size = 4 * 2 * (128 * 128 + 128)
    explained = ternc.explain(model, x).totals
    fast(x)
    trained = ternc.report(fast).totals
    assert explained == trained and trained.bytes_before == trained.bytes_after == size
    with torch.no_grad():
        fast(x)
    packed = ternc.report(fast)
    fast(x + 1)
    assert ternc.report(fast).totals == packed.totals
    assert packed.totals.bytes_before == size > packed.totals.bytes_after
    assert packed.rows[0].pattern == "linear"


@pytest.mark.parametrize("ask", [ternc.explain, ternc.report, ternc.repack, ternc.quantize])
def test_what_is_no_module_is_named(ask):
    with pytest.raises(UnsupportedModelError, match=r"torch.nn.Module, not a str"):
        ask("model")


def test_a_dict_is_no_config():
    for ask in (ternc.quantize, lambda m, config: ternc.explain(m, torch.ones(128), config=config)):
        with pytest.raises(ternc.errors.ConfigError, match=r"ternc.Config\(planes=2\)"):
            ask(Branches(), {"planes": 2})


def test_explain_refuses_what_the_backend_refuses():
    for setting in ({"method": "als"}, {"tie_scales": False}, {"planes": "auto", "bits_budget": 3}):
        with pytest.raises(ternc.errors.ConfigError, match=r"belongs to ternc\.quantize"):
            ternc.explain(Branches(), torch.ones(128), config=ternc.Config(**setting))


def test_a_packed_model_is_explained_as_it_is_reported():
    config = ternc.Config(planes=2, group_size=64, int8=("a",))
    q = ternc.quantize(Branches().eval(), config)
    explained, held = ternc.explain(q, torch.randn(3, 128)), ternc.report(q)
    (row,) = (row for row in explained.rows if row.name == "a")
    assert row.format == held.rows[0].format == "int8 row a8"
    assert row.bytes_after == held.rows[0].bytes_after
    (row,) = (r for r in ternc.explain(q, torch.randn(3, 128), False).rows if r.name == "b")
    assert row.format == held.rows[1].format == "ternary x2 g64 a8"
    assert 0 < row.bytes_at_rest < row.bytes_after == held.rows[1].bytes_after


def test_explain_may_be_asked_any_number_of_times_and_holds_no_weight():
    x, dead = torch.randn(3, 128), []
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = Branches().eval()
        with torch.no_grad():
            explained = ternc.explain(torch.compile(model), x)  # is that of the model inside
        assert actions(explained) == {"a": "rewritten", "b": "skipped"}
        dead.append(StorageWeakRef(model.a.weight.untyped_storage()))
        del model
    gc.collect()
    assert all(storage.expired() for storage in dead)


@pytest.mark.parametrize("free", [False, True])
def test_packed_modules_are_told_of_as_what_they_hold(free):
    """By explain, and by the report of a model that was built around them: shape, planes, totals;
    planes with scales of their own stand side by side in the graph.
    """
    config = ternc.Config(planes=2, group_size=32, tie_scales=not free)
    layers = OrderedDict(a=nn.Linear(128, 128), b=nn.Linear(128, 64))
    q, x = ternc.quantize(nn.Sequential(layers).eval(), config), torch.randn(3, 128)
    held = ternc.report(q)
    around = nn.Sequential(OrderedDict(inner=q))
    fast = torch.compile(around, backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(x)
        found = {"": ternc.explain(q, x), "inner.": ternc.report(fast)}
    for prefix, report in found.items():
        (row,) = (row for row in report.rows if row.name == f"{prefix}a")
        for field in ("format", "shape", "bytes_before", "bytes_after", "bytes_at_rest"):
            assert getattr(row, field) == getattr(held.rows[0], field)
        assert report.totals == held.totals


def test_a_model_compiled_in_two_ways_has_two_reports():
    model, x = Branches().eval(), torch.randn(3, 128)
    one, two = (
        torch.compile(model, backend="ternc", options={"inner": "eager", "planes": planes})
        for planes in (1, 2)
    )
    with torch.no_grad():
        one(x)
        assert "not compiled yet" in str(ternc.report(two))
        two(x)
    for planes, fast in ((1, one), (2, two)):
        assert ternc.report(fast).rows[0].format == f"ternary x{planes} row a8"
    assert actions(ternc.report(model)) == actions(ternc.report(one))


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


class Stack(nn.Module):
    """Four experts in one parameter, and a convolution whose weight has three dimensions too."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 128, 128) / 11)
        self.position = nn.Parameter(torch.randn(1, 3, 128))
        self.convolution = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.convolution(x + self.position), self.experts)


def test_quantize_tells_of_stacks_that_it_leaves(tmp_path):
    model = Stack().eval()
    q = ternc.quantize(model)
    (row,) = ternc.report(q).rows
    assert (row.name, row.action, row.shape) == ("experts", "skipped", (4, 128, 128))
    assert "a stack of 4 matrices" in row.reason and row.bytes_after == 4 * 4 * 128 * 128
    assert [r.name for r in ternc.report(ternc.quantize(q)).rows] == ["experts"]
    excluded = ternc.quantize(model, ternc.Config(exclude=("experts",)))
    assert "excluded by name" in ternc.report(excluded).rows[0].reason
    ternc.save(q, tmp_path / "saved")
    loaded = ternc.load(tmp_path / "saved", model=Stack())
    assert [r.reason for r in ternc.report(loaded).rows] == [row.reason]


@pytest.mark.parametrize(
    ("kind", "name", "shape"), [(Stack, "experts", (4, 3, 128)), (Branches, "a", (3, 128))]
)
def test_what_quantize_left_and_the_backend_packed_is_told_as_it_runs(kind, name, shape):
    q = ternc.quantize(kind().eval(), ternc.Config(exclude=(name,)))
    fast = torch.compile(q, backend="ternc", options={"inner": "eager", "exclude": ()})
    with torch.no_grad():
        fast(torch.randn(shape))
    report = ternc.report(fast)
    row = next(row for row in report.rows if row.name == name)
    assert row.action == "rewritten" and row.kernel not in (None, "reference")
    assert any("float weights stay in memory" in note for note in report.notes)


def test_a_report_needs_a_module():
    with pytest.raises(UnsupportedModelError, match="not a function"):
        ternc.report(torch.compile(lambda x: x, backend="ternc"))
