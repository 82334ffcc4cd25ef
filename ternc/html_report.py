"""`Report` -> one HTML page with everything in it: no network, no script of anybody else.

Tables and charts are written here; templates/ has the style, the frame and the scripts that sort
the table and draw the graphs from embedded JSON. Names come from models and are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from ternc.html_chart import layer_chart, size_bars
from ternc.html_graph import graph_data
from ternc.reporting import Report, Row, Totals, format_bytes

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("table.js", "layout.js", "graph.js")

_COLUMNS = (
    # (heading, class, first direction of a sort)
    ("layer", "name", "ascending"),
    ("format", "format", "ascending"),
    ("shape", "num shape", "descending"),
    ("bits", "num", "descending"),
    ("before", "num rest", "descending"),
    ("after", "num", "descending"),
    ("weight error", "num", "descending"),
    ("output error", "num", "descending"),
    ("kernel", "kernel", "ascending"),
    ("read limit", "num limit", "descending"),
)


def render(report: Report, *, title: str = "", bandwidth: float | None = None) -> str:
    """The page as text.

    Args:
        title: what the page is about, the name of the model.
        bandwidth: bytes a second that the memory of the machine can be read at; None: unknown.
    """
    sections = [("totals", "Whole model", _totals(report))]
    if report.rows:
        sections.append(("layers", "Layers", _layers(report, bandwidth)))
        sections.append(("kernels", "Kernels and their limit", _kernels(report.rows, bandwidth)))
        sections.append(("refusals", "Left as they were", _refusals(report.rows)))
    if report.nodes or report.nodes_before:
        sections.append(("graphs", "Graph before and after", _GRAPHS))
    style = _read("report.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    return Template(_read("report.html")).substitute(
        title=escape(f"ternc report: {title}" if title else "ternc report"),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        script=script,
        data=_embedded({**graph_data(report), "bandwidth": bandwidth}),
        links=" ".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections),
        sections="\n".join(
            f'<section id="{key}"><h2>{heading}</h2>\n{body}</section>'
            for key, heading, body in sections
        ),
    )


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Source expression of a Content-Security-Policy: this text inline, and nothing else."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: object) -> str:
    """JSON that no HTML parser can mistake for a tag or a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- whole model ---------------------------------------------------------------------------------


def _totals(report: Report) -> str:
    parts = []
    if report.status:
        parts.append(f'<p class="warn">{escape(report.status)}</p>')
    tiles = []
    weighed = [row for row in report.rows if row.shape]
    if report.rows:
        left = len(weighed) - len(report.rewritten)
        tiles.append(
            ("layers rewritten", f"{len(report.rewritten)} of {len(weighed)}", f"{left} left")
        )
    if report.attention:
        fused = sum(row.action == "rewritten" for row in report.attention)
        tiles.append(
            ("attention regions", f"{fused} of {len(report.attention)}", "fused or already so")
        )
    if totals := report.totals:
        tiles += _size_tiles(totals)
    if errors := [row.weight_error for row in report.rewritten if row.weight_error is not None]:
        middle = sorted(errors)[len(errors) // 2]
        tiles.append(("largest weight error", _error(max(errors)), f"median {_error(middle)}"))
    parts.append(
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
            for name, value, more in tiles
        )
        + "</dl>"
    )
    if report.totals:
        packed = [row for row in report.rewritten if row.shared_with is None]
        parts.append(size_bars(report.totals, packed))
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        parts.append(f'<ul class="notes">{notes}</ul>')
    return "\n".join(parts)


def _size_tiles(totals: Totals) -> list[tuple[str, str, str]]:
    return [
        (
            "in memory",
            format_bytes(totals.bytes_after),
            f"was {format_bytes(totals.bytes_before)}",
        ),
        ("at rest", format_bytes(totals.bytes_at_rest), "in a file"),
        (
            "bits per weight",
            f"{totals.bits_per_weight:.2f}",
            f"of {totals.weights:,} weights, embeddings included",
        ),
        (
            "smaller than fp32",
            f"{totals.ratio_fp32:.2f}x",
            f"{totals.ratio_bf16:.2f}x than bf16",
        ),
    ]


# --- layers --------------------------------------------------------------------------------------


def _layers(report: Report, bandwidth: float | None) -> str:
    rows = report.rows
    empty = {
        "output error": all(row.output_error is None for row in rows),
        "kernel": all(row.kernel is None for row in rows),
    }
    columns = [column for column in _COLUMNS if not empty.get(column[0], False)]
    head = "".join(
        f'<th class="{kind}" data-first="{first}"><button type="button">{name}</button></th>'
        for name, kind, first in columns
    )
    names = {name for name, _, _ in columns}
    body = "\n".join(_table_row(i, row, names, bandwidth) for i, row in enumerate(rows))
    waiting = ""
    if empty["kernel"]:
        waiting = (
            '<p class="hint">No call has run yet: the kernel of each layer is known from '
            "<code>ternc.report</code> after the first call.</p>"
        )
    chart = layer_chart([(i, row) for i, row in enumerate(rows) if row.shape])
    return f"""{chart}
<div class="tools"><input type="search" id="find" placeholder="find a layer, format or reason"
 aria-label="find in the table" size="30"> <select id="show" aria-label="which layers">
<option value="">all</option><option value="rewritten">rewritten</option>
<option value="skipped">left as they were</option></select>
<span class="hint" id="shown"></span></div>{waiting}
<div class="scroll"><table id="rows"><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>"""


def _table_row(index: int, row: Row, columns: set[str], bandwidth: float | None) -> str:
    found = [("found", row.pattern), ("why", row.reason)]
    if row.shared_with:
        found.append(("shared with", row.shared_with))
    if row.shape and row.action == "rewritten":
        found.append(("at rest", format_bytes(row.bytes_at_rest)))
    more = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in found)
    region = "" if row.shape else f' <span class="hint">{escape(row.pattern)}</span>'
    name = (
        f"<details><summary><code>{_breakable(row.name)}</code>{region}</summary>"
        f"<dl>{more}</dl></details>"
    )
    after = "shared" if row.shared_with else format_bytes(row.bytes_after)
    values: dict[str, tuple[object, str]] = {
        "layer": (row.name, name),
        "format": (row.format, escape(row.format)),
        "shape": (_elements(row), " x ".join(map(str, row.shape))),
        "bits": (row.bits_per_weight, f"{row.bits_per_weight:.2f}"),
        "before": (row.bytes_before, format_bytes(row.bytes_before)),
        "after": (0 if row.shared_with else row.bytes_after, after),
        "weight error": (row.weight_error, _error(row.weight_error)),
        "output error": (row.output_error, _error(row.output_error)),
        "kernel": (row.kernel, escape(row.kernel or "-")),
        "read limit": (row.bytes_after, _limit(row.bytes_after, bandwidth)),
    }
    if not row.shape:
        values = {key: values[key] if key == "layer" else (None, "-") for key in values}
    elif not _is_packed(row):
        values["read limit"] = (None, "-")
    cells = "".join(
        f'<td class="{kind}" data-value="{escape(_plain(values[name][0]))}">{values[name][1]}</td>'
        for name, kind, _ in _COLUMNS
        if name in columns
    )
    kind = "float" if row.action == "skipped" else "packed"
    return f'<tr id="row-{index}" class="{kind}" data-action="{escape(row.action)}">{cells}</tr>'


def _breakable(name: str) -> str:
    """A dotted name that may be broken after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _is_packed(row: Row) -> bool:
    """Whether a kernel reads packed bytes: while training, the float weight is read instead."""
    return row.action == "rewritten" and bool(row.shape) and "(training)" not in row.pattern


def _elements(row: Row) -> int:
    count = 1
    for size in row.shape:
        count *= size
    return count


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def _error(value: float | None) -> str:
    return "-" if value is None else "exact" if value == 0 else f"{value:.4f}"


def _limit(nbytes: int, bandwidth: float | None) -> str:
    """Least time to read that many bytes once; templates/table.js writes it the same way."""
    if not bandwidth:
        return "unknown"
    microseconds = nbytes / bandwidth * 1e6
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.2f} us"


# --- kernels -------------------------------------------------------------------------------------


def _kernels(rows: Sequence[Row], bandwidth: float | None) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    rows = [row for row in rows if _is_packed(row)]
    for row in rows:
        groups.setdefault((row.kernel or "not run yet", row.format), []).append(row)
    if not groups:
        return '<p class="hint">No layer is packed.</p>'
    lines = [
        _kernel_line(escape(kernel), escape(packed), members, bandwidth)
        for (kernel, packed), members in sorted(groups.items())
    ]
    if len(groups) > 1:
        lines.append(_kernel_line("all", "", rows, bandwidth))
    slow = ""
    if any(row.kernel == "reference" for row in rows):
        slow = (
            '<p class="warn">Layers under <code>reference</code> ran the slow eager reference: '
            "<code>ternc info</code> says why no kernel runs on this machine.</p>"
        )
    return f"""<p>A product with one token reads its packed weight once. It cannot take less time
than the memory needs to deliver those bytes: the read limit, one line for all layers of a kind.</p>
{slow}<div class="tools"><label>memory bandwidth
<input type="number" id="bandwidth" min="0" step="any" size="8" placeholder="unknown"> GB/s</label>
</div>
<div class="scroll"><table><thead><tr><th>kernel</th><th>format</th>
<th class="num">layers</th><th class="num">packed bytes read</th>
<th class="num">read limit</th></tr></thead><tbody>
{"".join(lines)}</tbody></table></div>"""


def _kernel_line(kernel: str, packed: str, rows: Sequence[Row], bandwidth: float | None) -> str:
    nbytes = sum(row.bytes_after for row in rows)
    return (
        f'<tr><td class="kernel">{kernel}</td><td class="format">{packed}</td>'
        f'<td class="num">{len(rows)}</td><td class="num">{format_bytes(nbytes)}</td>'
        f'<td class="num limit" data-value="{nbytes}">{_limit(nbytes, bandwidth)}</td></tr>\n'
    )


# --- refusals ------------------------------------------------------------------------------------


def _refusals(rows: Iterable[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.action == "skipped":
            groups.setdefault(row.reason, []).append(row)
    if not groups:
        return '<p class="hint">Nothing was refused.</p>'
    return "\n".join(
        _refusal(reason, members)
        for reason, members in sorted(groups.items(), key=lambda item: -_weight(item[1]))
    )


def _refusal(reason: str, rows: Sequence[Row]) -> str:
    items = "".join(
        f"<li><code>{_breakable(row.name)}</code> "
        f'<span class="hint">{escape(row.pattern)}</span></li>'
        for row in rows
    )
    count = f"{len(rows)} layer{'s' if len(rows) > 1 else ''}, {format_bytes(_weight(rows))}"
    return (
        f'<div class="refusal"><h3>{escape(reason)}</h3>'
        f'<details{" open" if len(rows) <= 12 else ""}><summary class="hint">{count}</summary>'
        f"<ul>{items}</ul></details></div>"
    )


def _weight(rows: Iterable[Row]) -> int:
    return sum(row.bytes_before for row in rows)


_GRAPHS = """<p class="hint">Click a module to open it, its title to close it; both graphs follow.
Drag to move; the buttons zoom, and so does the wheel once the graph has been clicked.</p>
<div class="tools"><button type="button" id="open-all">Open all</button>
<button type="button" id="close-all">Close all</button>
<label><input type="checkbox" id="weights"> show weights</label></div>
<div class="key" id="kinds"></div>
<div class="graphs">
<div class="graph" id="before"><div class="tools"><h3>Before</h3>
<div><button type="button" data-do="in" aria-label="zoom in">+</button>
<button type="button" data-do="out" aria-label="zoom out">&minus;</button>
<button type="button" data-do="fit">Fit</button></div></div></div>
<div class="graph" id="after"><div class="tools"><h3>After</h3>
<div><button type="button" data-do="in" aria-label="zoom in">+</button>
<button type="button" data-do="out" aria-label="zoom out">&minus;</button>
<button type="button" data-do="fit">Fit</button></div></div></div>
</div>"""
