"""The page of a report: well formed, nothing unescaped, nothing fetched, the graphs' data."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import pytest
import torch
from html_reports import HOSTILE, Stack, hostile_report, row, skipped, stack_report

import ternc
from ternc import html_report
from ternc.html_chart import layer_chart
from ternc.html_graph import KINDS, graph_data, kind_of
from ternc.reporting import GraphNode, Report, Row
from ternc.runtime import ops

VOID = {"meta", "input", "br", "wbr", "hr", "img", "link"}


class Page(html.parser.HTMLParser):
    """Elements of a page; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.raw, self.open = [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            kind = self.elements[-1][1].get("type", inside)
            self.raw[kind] = self.raw.get(kind, "") + data
        else:
            self.text.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


@pytest.fixture
def hostile():
    return hostile_report()


def test_every_string_is_escaped(hostile):
    page = Page(html_report.render(hostile, title=HOSTILE))
    assert "injected" not in page.attributes("id")
    assert not [tag for tag, _ in page.elements if tag == "b" and "id" in dict(_)]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert "".join(page.text).count(HOSTILE) >= 10, "and none of it is lost"
    data = json.loads(page.raw["application/json"])
    assert data["after"][0]["name"] == HOSTILE


def test_ids_are_unique_and_links_lead_somewhere(hostile):
    page = Page(html_report.render(hostile))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    links = page.attributes("href")
    assert links and all(link.removeprefix("#") in ids for link in links)


def test_nothing_is_fetched(hostile):
    text = html_report.render(hostile)
    page = Page(text)
    assert not page.attributes("src")
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\"'\s]*", text)
    assert addresses == ["http://www.w3.org/2000/svg"], "the name of SVG, which nobody fetches"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_policy_allows_this_style_and_script_alone(hostile):
    page = Page(html_report.render(hostile))
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not page.attributes("style"), "the policy would drop them"


def test_embedded_graphs_are_the_reports(hostile):
    page = Page(html_report.render(hostile, bandwidth=2e9))
    data = json.loads(page.raw["application/json"])
    assert data == {**graph_data(hostile), "bandwidth": 2e9}
    assert data["before"][1]["inputs"] == [0]


def test_every_row_is_in_the_table_and_every_refusal_in_its_group():
    rows = [row("a.0"), skipped("a.1", "too odd"), skipped("a.2", "too odd"), skipped("b", "no")]
    text = html_report.render(Report(rows=rows))
    assert [i for i in Page(text).attributes("id") if i.startswith("row-")] == [
        f"row-{i}" for i in range(4)
    ]
    refusals = text[text.index('<section id="refusals">') :]
    assert refusals.count("<h3>too odd</h3>") == 1 and "2 layers, 65.5 kB" in refusals
    assert refusals.count("<h3>no</h3>") == 1


def test_read_limit_is_unknown_until_the_bandwidth_is_known():
    report = Report(rows=[row("a"), row("b", bytes_after=54_400_000)])
    page = "".join(Page(html_report.render(report)).text)
    assert page.count("unknown") == 3, "two layers and the line of their kernel"
    page = "".join(Page(html_report.render(report, bandwidth=10e9)).text)
    assert "unknown" not in page
    assert "0.54 us" in page and page.count("5.44 ms") == 2


def test_weights_in_training_have_no_read_limit():
    report = Report(rows=[row("a", pattern="linear (training)")])
    page = "".join(Page(html_report.render(report)).text)
    assert "unknown" not in page and "No layer is packed" in page


def test_reference_is_called_slow():
    assert "ternc info" in html_report.render(Report(rows=[row("a", kernel="reference")]))
    assert "ternc info" not in html_report.render(Report(rows=[row("a")]))


@pytest.mark.parametrize(
    "report",
    [
        Report(),
        Report(status="not compiled yet"),
        Report(rows=[skipped("a", "excluded")]),
        Report(rows=[Row("a", "attention: q -> o", "rewritten", "fused")]),
        Report(rows=[row("a", weight_error=0.0, bytes_before=0, bytes_after=0, shape=(0, 4))]),
    ],
    ids=["empty", "status", "refusals only", "region only", "nothing in it"],
)
def test_reports_with_little_in_them(report):
    text = html_report.render(report)
    Page(text)
    assert report.status in text and "nan" not in text


def test_chart_marks_what_it_cuts_off():
    rows = [(0, row("a.0")), (1, skipped("head", "excluded"))]
    assert "warn" not in layer_chart(rows)
    rows[1][1].bytes_before = 100 * rows[0][1].bytes_before
    assert "warn" in layer_chart(rows)


@pytest.mark.parametrize("name", sorted(definition.name for definition in ops.ALL))
def test_every_operator_has_a_colour(name):
    kind = kind_of(GraphNode("n", "call_function", f"ternc.{name}.default", ()))
    assert kind != "other" or name == "fit", "add its kind to ternc/html_graph.py"
    style = (Path(html_report.__file__).parent / "templates" / "report.css").read_text()
    assert all(f"--{kind}:" in style for kind in KINDS)


def test_results_of_an_operation_with_several_are_not_drawn():
    nodes = [
        GraphNode("x", "placeholder", "x", ()),
        GraphNode("pair", "call_function", "ternc.quantize_act.default", ("x",), value="(a, b)"),
        GraphNode("first", "call_function", "_operator.getitem", ("pair",)),
        GraphNode("slice", "call_function", "_operator.getitem", ("x",)),
        GraphNode("sum", "call_function", "_operator.add", ("first", "slice")),
    ]
    drawn = graph_data(Report(nodes=nodes))["after"]
    assert [node["name"] for node in drawn] == ["x", "pair", "slice", "sum"]
    assert drawn[3]["inputs"] == [1, 2]


def test_weights_are_drawn_where_they_are_read_and_only_if_they_are():
    weight = "l_self_modules_a_parameters_weight_"
    nodes = [
        GraphNode("x", "placeholder", "x", (), "a"),
        GraphNode(weight, "placeholder", weight, (), "elsewhere", weight=True),
        GraphNode("unread", "placeholder", "unread", (), "a", weight=True),
        GraphNode("y", "call_function", "torch.linear", ("x", weight), "a"),
    ]
    drawn = graph_data(Report(nodes=nodes))["after"]
    assert [(node["label"], node["layer"]) for node in drawn] == [
        ("x", ""),
        ("weight", "a"),
        ("linear", "a"),
    ]


def test_both_graphs_are_in_the_report(tmp_path):
    report = stack_report()
    before = [node for node in report.nodes_before if node.op == "call_function"]
    after = [node for node in report.nodes if node.op == "call_function"]
    assert sum(node.target.endswith(".linear") for node in before) == 10
    assert not [node for node in before if "ternc" in node.target]
    assert [node for node in after if "ternc" in node.target]
    assert {node.layer for node in before} >= {"blocks.0", "blocks.2.up", "lm_head"}
    assert any(node.value == "float32[2, 5, 128]" for node in before)
    assert sum(node.weight for node in report.nodes_before) == 26, "every parameter"
    report.to_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert len(written["graph_before"]) == len(report.nodes_before)


def test_a_compiled_model_reports_both_graphs():
    torch._dynamo.reset()
    fast = torch.compile(Stack().eval(), backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(torch.randn(2, 5, 64))
    report = ternc.report(fast)
    assert sum(node.target.endswith(".linear") for node in report.nodes_before) == 10
    assert [node for node in report.nodes if "ternc" in node.target]
