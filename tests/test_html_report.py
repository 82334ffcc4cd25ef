"""The page of a report: well formed, nothing unescaped, nothing fetched; seen by a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc import html_report
from ternc.html_chart import layer_chart
from ternc.html_graph import KINDS, graph_data, kind_of
from ternc.reporting import GraphNode, Report, Row, Totals
from ternc.runtime import ops

HOSTILE = "</script><b id=injected onclick='x'>&amp;\"'<!--"
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


@pytest.fixture
def hostile():
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


# --- a real model, a real browser ----------------------------------------------------------------


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


@pytest.fixture(scope="module")
def stack_report():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        return ternc.explain(Stack().eval(), torch.randn(2, 5, 64))


def test_both_graphs_are_in_the_report(stack_report, tmp_path):
    before = [node for node in stack_report.nodes_before if node.op == "call_function"]
    after = [node for node in stack_report.nodes if node.op == "call_function"]
    assert sum(node.target.endswith(".linear") for node in before) == 10
    assert not [node for node in before if "ternc" in node.target]
    assert [node for node in after if "ternc" in node.target]
    assert {node.layer for node in before} >= {"blocks.0", "blocks.2.up", "lm_head"}
    assert any(node.value == "float32[2, 5, 128]" for node in before)
    assert sum(node.weight for node in stack_report.nodes_before) == 26, "every parameter"
    stack_report.to_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert len(written["graph_before"]) == len(stack_report.nodes_before)


def test_a_compiled_model_reports_both_graphs():
    torch._dynamo.reset()
    fast = torch.compile(Stack().eval(), backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        fast(torch.randn(2, 5, 64))
    report = ternc.report(fast)
    assert sum(node.target.endswith(".linear") for node in report.nodes_before) == 10
    assert [node for node in report.nodes if "ternc" in node.target]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

ACTIONS = """
const rows = (key) => [...document.querySelectorAll("#rows tbody tr")]
  .filter((row) => !row.hidden).map((row) => row.cells[0].dataset.value);
const found = {};
byId("rows").tHead.rows[0].cells[0].firstChild.click(); found.ascending = rows();
byId("rows").tHead.rows[0].cells[0].firstChild.click(); found.descending = rows();
byId("find").value = "UP blocks.1"; byId("find").dispatchEvent(new Event("input"));
found.searched = rows();
byId("find").value = ""; byId("show").value = "skipped";
byId("show").dispatchEvent(new Event("input")); found.refused = rows();
document.querySelectorAll(".hit")[2].dispatchEvent(new Event("click"));
found.chosen = [...document.querySelectorAll("tr.chosen")].map((r) => r.cells[0].dataset.value);
byId("bandwidth").value = "0.001"; byId("bandwidth").dispatchEvent(new Event("input"));
found.limits = [...document.querySelectorAll("#kernels td.limit")].map((c) => c.textContent);
byId("close-all").click();
found.closed = document.querySelectorAll("#after .item").length;
[...document.querySelectorAll("#after .item")].find((i) => i.textContent.startsWith("+"))
  .dispatchEvent(new Event("click"));
found.frames = ["before", "after"].map((id) => document.querySelectorAll(`#${id} .frame`).length);
byId("open-all").click();
found.drawn = views.map((view) => [leavesOf(view.root).length, view.byOrder.size]);
found.boxes = views.map((view) => layoutTree(view.root, opened, view.nodes).items
  .filter((box) => !box.item.open).map(({x, y, width, height}) => [x, y, width, height]));
views[1].choose(leavesOf(views[1].root).find((leaf) => leaf.node.kind === "product"));
found.detail = views[1].detail.textContent;
found.marked = document.querySelectorAll("#after path.on").length;
byId("weights").click();
found.weights = document.querySelectorAll("#before .item.weight").length;
found.backward = document.querySelectorAll("path.back").length;
const scale = views[0].scale;
document.querySelector("#before [data-do=in]").click(); found.zoom = views[0].scale / scale;
"""


def browse(text, path, script="", *options):
    """The page in headless Chromium -> (what `script` left in `found`, the DOM)."""
    if script:  # the policy of the page lets no other script run
        text = re.sub(r"<meta http-equiv[^>]*>", "", text)
        script += "document.body.append(element('pre', document.body, JSON.stringify(found)));"
        script += "document.body.lastChild.id = 'found';"
        text = text.replace("</body>", f"<script>{script}</script></body>")
    path.write_text(text, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", *options, "--dump-dom"]
    command += [f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(match.group(1))) if match else None, done.stdout


@needs_browser
def test_browser_draws_the_page_under_its_policy(stack_report, tmp_path):
    stack_report.to_html(tmp_path / "report.html", title="stack")
    text = (tmp_path / "report.html").read_text()
    _, dom = browse(text, tmp_path / "page.html")
    assert dom.count('class="canvas"') == 2
    assert dom.count('class="item product tinted"') > 0
    assert "10 of 10 shown" in dom


@needs_browser
def test_browser_runs_nothing_of_a_hostile_report(hostile, tmp_path):
    _, dom = browse(html_report.render(hostile, title=HOSTILE), tmp_path / "page.html")
    assert "<b id=" not in dom and dom.count('class="canvas"') == 2


@needs_browser
def test_browser_sorts_finds_opens_and_zooms(stack_report, tmp_path):
    found, _ = browse(html_report.render(stack_report), tmp_path / "page.html", ACTIONS)
    names = [row.name for row in stack_report.rows]
    assert found["ascending"] == sorted(names)
    assert found["descending"] == sorted(names, reverse=True)
    assert set(found["searched"]) == {
        row.name for row in stack_report.rows if "blocks.1" in row.name and "up" in str(row)
    }
    assert found["refused"] == ["lm_head"]
    assert found["chosen"] == [stack_report.rows[2].name]
    assert all(limit.endswith(" ms") for limit in found["limits"])
    assert found["frames"] == [1, 1], "both graphs open the same module"
    assert found["closed"] < found["drawn"][1][0] == found["drawn"][1][1]
    assert "ternc." in found["detail"] and found["marked"] >= 2
    assert found["weights"] == sum(node.weight for node in stack_report.nodes_before)
    assert found["backward"] == 0, "every edge leads down, from the weights too"
    assert found["zoom"] == pytest.approx(1.4)
    for boxes in found["boxes"]:
        for i, (x, y, width, height) in enumerate(boxes):
            for left, top, wide, high in boxes[:i]:
                apart = (
                    x >= left + wide or left >= x + width or y >= top + high or top >= y + height
                )
                assert apart, "two boxes lie on each other"


@needs_browser
@pytest.mark.parametrize("width", [600, 1280])
def test_browser_fits_the_page_into_the_window(stack_report, tmp_path, width):
    script = "const found = {wide: document.documentElement.scrollWidth, window: innerWidth};"
    page = html_report.render(stack_report)
    found, _ = browse(page, tmp_path / "page.html", script, f"--window-size={width},900")
    assert found["wide"] <= found["window"]


@needs_browser
def test_browser_follows_the_colour_scheme(stack_report, tmp_path):
    script = "const found = [getComputedStyle(document.body).backgroundColor];"
    page = html_report.render(stack_report)
    light, _ = browse(page, tmp_path / "page.html", script)
    dark, _ = browse(
        page, tmp_path / "page.html", script, "--blink-settings=preferredColorScheme=0"
    )
    luminance = [sum(map(int, re.findall(r"\d+", c)[:3])) for (c,) in (light, dark)]
    assert luminance[0] > 600 > 150 > luminance[1]


@needs_browser
def test_browser_takes_a_picture(stack_report, tmp_path):
    picture = tmp_path / "page.png"
    browse(html_report.render(stack_report), tmp_path / "page.html", "", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000, "a blank page is smaller"
