"""The page of a report in headless Chromium: drawn, sorted, searched, opened, zoomed, coloured."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from html_reports import HOSTILE, hostile_report
from html_reports import stack_report as make_stack_report

from ternc import html_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

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


@pytest.fixture(scope="module")
def stack_report():
    return make_stack_report()


def test_browser_draws_the_page_under_its_policy(stack_report, tmp_path):
    stack_report.to_html(tmp_path / "report.html", title="stack")
    text = (tmp_path / "report.html").read_text()
    _, dom = browse(text, tmp_path / "page.html")
    assert dom.count('class="canvas"') == 2
    assert dom.count('class="item product tinted"') > 0
    assert "10 of 10 shown" in dom


def test_browser_runs_nothing_of_a_hostile_report(tmp_path):
    _, dom = browse(html_report.render(hostile_report(), title=HOSTILE), tmp_path / "page.html")
    assert "<b id=" not in dom and dom.count('class="canvas"') == 2


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


@pytest.mark.parametrize("width", [600, 1280])
def test_browser_fits_the_page_into_the_window(stack_report, tmp_path, width):
    script = "const found = {wide: document.documentElement.scrollWidth, window: innerWidth};"
    page = html_report.render(stack_report)
    found, _ = browse(page, tmp_path / "page.html", script, f"--window-size={width},900")
    assert found["wide"] <= found["window"]


def test_browser_follows_the_colour_scheme(stack_report, tmp_path):
    script = "const found = [getComputedStyle(document.body).backgroundColor];"
    page = html_report.render(stack_report)
    light, _ = browse(page, tmp_path / "page.html", script)
    dark, _ = browse(
        page, tmp_path / "page.html", script, "--blink-settings=preferredColorScheme=0"
    )
    luminance = [sum(map(int, re.findall(r"\d+", c)[:3])) for (c,) in (light, dark)]
    assert luminance[0] > 600 > 150 > luminance[1]


def test_browser_takes_a_picture(stack_report, tmp_path):
    picture = tmp_path / "page.png"
    browse(html_report.render(stack_report), tmp_path / "page.html", "", f"--screenshot={picture}")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000, "a blank page is smaller"
