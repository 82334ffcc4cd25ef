"""Report rows -> inline SVG: sizes before and after, weight errors, one column a layer.

Horizontal positions are percentages and vertical ones pixels, so that a chart takes the width it is
given and its text keeps its size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from ternc.reporting import Row, Totals, format_bytes

_SIZE_HEIGHT, _ERROR_HEIGHT, _LABEL_HEIGHT = 150, 90, 18
_CLIP = 3.0
"""A layer left in floating point is cut off where it is that many times the largest rewritten."""


def size_bars(totals: Totals, packed: Sequence[Row]) -> str:
    """Two bars, before and after: bytes of the rewritten layers, and of everything else."""
    after = sum(row.bytes_after for row in packed)
    rest = totals.bytes_after - after
    most = max(totals.bytes_before, totals.bytes_after, 1)
    bars = (
        ("before", (("before", totals.bytes_before - rest), ("float", rest))),
        ("after", (("after", after), ("float", rest))),
    )
    lines = []
    for name, parts in bars:
        x, drawn = 0.0, []
        for kind, nbytes in parts:
            width = 100 * nbytes / most
            drawn.append(
                f'<rect class="{kind}" x="{x:.3f}%" width="{width:.3f}%" height="18">'
                f"<title>{format_bytes(nbytes)}</title></rect>"
            )
            x += width
        lines.append(
            f'<span>{name}</span><svg role="img" aria-label="{name}">{"".join(drawn)}</svg>'
        )
    key = (
        f'<div class="key"><span class="before"><b>rewritten layers, before '
        f"{format_bytes(totals.bytes_before - rest)}</b></span>"
        f'<span class="after"><b>after {format_bytes(after)}</b></span>'
        f'<span class="float"><b>all else, unchanged: {format_bytes(rest)}</b></span></div>'
    )
    return f'<div class="stack">{"".join(lines)}</div>{key}'


def layer_chart(rows: Sequence[tuple[int, Row]]) -> str:
    """Columns of sizes over columns of errors; `rows` are (number of the table row, row)."""
    if not rows:
        return ""
    key = (
        '<div class="key"><span class="before"><b>size before</b></span>'
        '<span class="after"><b>size after, weight error</b></span>'
        '<span class="float"><b>left in floating point</b></span></div>'
    )
    step = 100 / len(rows)
    packed = max((row.bytes_before for _, row in rows if row.action == "rewritten"), default=0)
    most = max(row.bytes_before for _, row in rows)
    top = packed if packed and most > _CLIP * packed else most
    sizes = "".join(_size_column(i * step, step, row, top) for i, (_, row) in enumerate(rows))
    errors = [row.weight_error for _, row in rows if row.weight_error]
    parts = [
        _axis([(format_bytes(top), 10), ("0", _SIZE_HEIGHT)], _SIZE_HEIGHT),
        f'<svg height="{_SIZE_HEIGHT}" role="img" aria-label="size of each layer">'
        f"{_blocks(rows, _SIZE_HEIGHT, False)}{_rule(0)}{_rule(_SIZE_HEIGHT)}"
        f"{sizes}{_targets(rows, _SIZE_HEIGHT)}</svg>",
    ]
    height = _LABEL_HEIGHT
    if errors:
        height += _ERROR_HEIGHT
        largest = max(errors)
        stems = "".join(_stem(i * step, step, row, largest) for i, (_, row) in enumerate(rows))
        parts.append(_axis([(f"{largest:.3f}", 20), ("0", _ERROR_HEIGHT)], height))
        plot = f"{_rule(10)}{_rule(_ERROR_HEIGHT)}{stems}"
    else:
        parts.append("<svg></svg>")
        plot = ""
    parts.append(
        f'<svg height="{height}" role="img" aria-label="weight error of each layer">'
        f"{_blocks(rows, height, True)}{plot}{_targets(rows, height)}</svg>"
    )
    return f'{key}<div class="chart">{"".join(parts)}</div>'


def _axis(labels: Sequence[tuple[str, int]], height: int) -> str:
    texts = "".join(f'<text x="56" y="{y}" text-anchor="end">{text}</text>' for text, y in labels)
    return f'<svg height="{height}" aria-hidden="true">{texts}</svg>'


def _rule(y: int) -> str:
    return f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>'


def _size_column(x: float, step: float, row: Row, top: int) -> str:
    """The size before, and before it the size after; a layer left alone has one column."""

    def column(nbytes: int, kind: str, inset: float) -> str:
        height = min(1.0, nbytes / top) * (_SIZE_HEIGHT - 8) if top else 0.0
        return (
            f'<rect class="{kind}" x="{x + inset * step:.3f}%" y="{_SIZE_HEIGHT - height:.1f}" '
            f'width="{(1 - 2 * inset) * step:.3f}%" height="{height:.1f}"/>'
        )

    if row.action == "skipped":
        cut = row.bytes_before > top
        mark = f'<rect class="warn" x="{x + 0.12 * step:.3f}%" y="8" width="{0.76 * step:.3f}%"'
        return column(row.bytes_before, "float", 0.12) + (f'{mark} height="3"/>' if cut else "")
    after = 0 if row.shared_with else row.bytes_after
    return column(row.bytes_before, "before", 0.12) + column(after, "after", 0.26)


def _stem(x: float, step: float, row: Row, largest: float) -> str:
    """A stem with a head at the weight error; nothing where there is none."""
    if row.weight_error is None:
        return ""
    middle = x + step / 2
    y = _ERROR_HEIGHT - row.weight_error / largest * (_ERROR_HEIGHT - 14)
    return (
        f'<line class="stem" x1="{middle:.3f}%" x2="{middle:.3f}%" y1="{_ERROR_HEIGHT}" '
        f'y2="{y:.1f}"/><circle class="after" cx="{middle:.3f}%" cy="{y:.1f}" r="3"/>'
    )


def _targets(rows: Sequence[tuple[int, Row]], height: int) -> str:
    """Invisible columns that say what they are, and lead to their row of the table."""
    step = 100 / len(rows)
    return "".join(
        f'<rect class="hit" data-row="{number}" x="{i * step:.3f}%" width="{step:.3f}%" '
        f'height="{height}"><title>{escape(_caption(row))}</title></rect>'
        for i, (number, row) in enumerate(rows)
    )


def _caption(row: Row) -> str:
    sizes = format_bytes(row.bytes_before)
    if row.action == "skipped":
        return f"{row.name}\nleft in floating point, {sizes}"
    after = f"shared with {row.shared_with}" if row.shared_with else format_bytes(row.bytes_after)
    error = "" if row.weight_error is None else f"\nweight error {row.weight_error:.4f}"
    return f"{row.name}\n{sizes} -> {after}{error}"


def _blocks(rows: Sequence[tuple[int, Row]], height: int, labelled: bool) -> str:
    """A stripe under every second block, and as many names of blocks as there is room for."""
    step = 100 / len(rows)
    stripes, names, free = [], [], 0.0
    for i, (name, first, count) in enumerate(_runs([row.name for _, row in rows])):
        x, width = first * step, count * step
        if i % 2 == 0:
            stripes.append(
                f'<rect class="block" x="{x:.3f}%" width="{width:.3f}%" height="{height}"/>'
            )
        wide = 1.4 * len(name)  # percent: a letter of 7 px in a chart of 500
        middle = x + width / 2
        if labelled and middle - wide / 2 >= free and middle + wide / 2 <= 100:
            free = middle + wide / 2 + 1
            names.append(
                f'<text x="{middle:.3f}%" y="{height - 4}" text-anchor="middle">'
                f"{escape(name)}</text>"
            )
    return "".join(stripes + names)


def _runs(names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Consecutive layers of one block: (`layers.0`, first, count)."""
    first = 0
    for i in range(1, len(names) + 1):
        if i == len(names) or _block(names[i]) != _block(names[first]):
            yield _block(names[first]), first, i - first
            first = i


def _block(name: str) -> str:
    """`model.layers.0.mlp.up` -> `layers.0`; a name without a number keeps its last part."""
    found = re.match(r"(?:.*?\.)??((?:[^.]+\.)?\d+)(?:\.|$)", name)
    return found.group(1) if found else name.rpartition(".")[2]
