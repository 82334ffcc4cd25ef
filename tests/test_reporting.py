"""Report: totals over storages, table and JSON (golden files), graph of a traced module."""

import json
import os
from pathlib import Path

import pytest
import torch

from ternc.passes.describe import describe_graph
from ternc.reporting import Report, Row, Totals, format_bytes, model_bytes

GOLDEN = Path(__file__).parent / "golden"


def assert_golden(name, text):
    """Compare with tests/golden/<name>; TERNC_ACCEPT=1 (make accept) writes it instead."""
    path = GOLDEN / name
    if os.environ.get("TERNC_ACCEPT"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; make accept, read the diff"


def linear_row(name, **changes):
    values = {
        "pattern": "linear",
        "action": "rewritten",
        "reason": "3 planes: weight error 0.0641 is within the budget of 0.10",
        "format": "ternary x3 g128 a8",
        "shape": (64, 128),
        "bytes_before": 4 * 64 * 128,
        "bytes_after": 5440,
        "bytes_at_rest": 5312,
        "bits_per_weight": 5.3125,
        "weight_error": 0.0641,
        "kernel": "avx512vnni",
    }
    return Row(name, **{**values, **changes})


def skipped_row(name, reason, pattern="linear"):
    return Row(
        name,
        pattern,
        "skipped",
        reason,
        shape=(8, 128),
        bytes_before=4096,
        bytes_after=4096,
        bytes_at_rest=4096,
        bits_per_weight=32.0,
    )


@pytest.fixture
def report():
    refused = "group of 96 columns does not divide the 128 columns that the fused partner reads"
    return Report(
        rows=[
            linear_row("encoder.layers.0.feed_forward.up"),
            linear_row(
                "encoder.layers.0.a_rather_long_name_for_a_block.attention.in_projection",
                pattern="multihead_attention.in_proj, fused with encoder.norm",
                output_error=0.0123,
            ),
            linear_row(
                "exact", format="ternary x1 row a8", weight_error=0.0, reason="ternary by value"
            ),
            linear_row("tied", shared_with="exact", kernel=None),
            Row("attention", "attention: q, k, v -> softmax(q k) v -> o", "rewritten", "fused"),
            skipped_row("lm_head", "excluded by name (exclude='lm_head')"),
            skipped_row("odd.0", refused),
            skipped_row("odd.1", refused),
        ],
        totals=Totals(
            weights=40_000, bytes_before=160_000, bytes_after=43_210, bytes_at_rest=42_000
        ),
        notes=[
            "float and packed copies are both in memory; ternc.quantize(model) drops the float one"
        ],
    )


def test_golden_table(report):
    assert_golden("report.txt", str(report) + "\n")


def test_golden_json(report, tmp_path):
    report.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == report.to_dict()
    assert_golden("report.json", text)


def test_every_row_is_shown_and_every_reason_whole(report):
    text = " ".join(str(report).split())
    for row in report.rows:
        assert row.name.split(".")[-1] in text
    assert report.skipped[1].reason in text
    assert text.count(report.skipped[1].reason) == 1, "equal refusals are grouped"


def test_status_comes_first():
    text = str(Report(status="not compiled yet: call the model once"))
    assert text.startswith("not compiled yet")


def test_reference_rows_are_found(report):
    assert report.reference_rows == []
    report.rows[0].kernel = "reference"
    assert [row.name for row in report.reference_rows] == [report.rows[0].name]


def test_model_bytes_counts_tied_weights_once():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    )
    assert model_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert model_bytes(model) == 8 * 8 * 4


def test_model_bytes_counts_views_of_one_storage_once():
    model = torch.nn.Module()
    whole = torch.zeros(10, 4)
    model.register_buffer("first", whole[:5])
    model.register_buffer("second", whole[5:])
    assert model_bytes(model) == 160


def test_totals_are_the_same_from_the_float_and_from_the_packed_model():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 128), torch.nn.Linear(128, 64))
    row = linear_row("1")
    from_float = Totals.of(model, [row], replaced=[model[1].weight])

    packed = torch.nn.Module()
    packed.embedding, packed.bias = model[0], model[1].bias
    packed.register_buffer("weight", torch.zeros(row.bytes_after, dtype=torch.uint8))
    from_packed = Totals.of(packed, [row], replaced=[packed.weight])

    assert from_float == from_packed
    assert from_float.weights == 10 * 128 + 64 * 128 + 64
    assert from_float.bytes_before == 4 * from_float.weights
    assert from_float.bytes_after == 4 * (10 * 128 + 64) + row.bytes_after
    assert from_float.bytes_at_rest == 4 * (10 * 128 + 64) + row.bytes_at_rest
    assert from_float.ratio_fp32 == pytest.approx(2 * from_float.ratio_bf16)
    assert from_float.bits_per_weight == pytest.approx(32 / from_float.ratio_fp32)


def test_totals_of_a_model_that_has_no_weights_yet():
    assert Totals.of(torch.nn.LazyLinear(8), [], replaced=[]) == Totals(0, 0, 0, 0)


def test_totals_count_a_shared_weight_once():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
    rows = [linear_row("0"), linear_row("1", shared_with="0")]
    assert Totals.of(model, rows, replaced=[model[0].weight]).weights == 128 * 64


def test_skipped_rows_stay_in_the_rest():
    model = torch.nn.Sequential(torch.nn.Linear(128, 8, bias=False))
    totals = Totals.of(model, [skipped_row("0", "excluded by name")], replaced=[])
    assert totals == Totals(1024, 4096, 4096, 4096)


def test_graph_has_an_edge_from_producer_to_user():
    class Block(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) + x

    nodes = describe_graph(torch.fx.symbolic_trace(Block()).graph, prefix="g0.")
    graph = Report(nodes=nodes).graph
    assert set(graph.edges) >= {("g0.x", "g0.relu"), ("g0.relu", "g0.add"), ("g0.x", "g0.add")}
    assert graph.nodes["g0.relu"]["op"] == "call_function"
    assert "relu" in graph.nodes["g0.relu"]["target"]
    assert Report().graph is None


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_600, "1.0 MB"), (91_000_000, "91.0 MB")],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
