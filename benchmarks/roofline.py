"""Rows of bench_linear -> a roofline plot: rate over operations a byte of weight, as PNG.

One panel a shape; memory is the slope, the multiply instructions are the roof, and a kernel is one
line over the token counts.
"""

from __future__ import annotations

from typing import Any

COLUMNS = 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
MARKERS = "osD^vPX*"


def load() -> Any:
    """matplotlib.pyplot without a display; ImportError naming the extra where there is none."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'ternc[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: list[dict[str, Any]], facts: dict[str, Any], path: str) -> None:
    """Write the picture."""
    pyplot = load()
    shapes = list(dict.fromkeys(row["K x N"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    wide = min(len(shapes), COLUMNS)
    high = -(-len(shapes) // wide)
    figure, panels = pyplot.subplots(
        high, wide, figsize=(5.2 * wide, 4.4 * high + 0.8), squeeze=False, sharex=True, sharey=True
    )
    for panel, shape in zip(panels.flat, shapes, strict=False):
        _panel(panel, [row for row in rows if row["K x N"] == shape], kernels, facts)
        panel.set_title(f"{shape.replace('x', ' to ')} features", fontsize=11)
    # The token counts stand below every point.
    panels[0, 0].set_ylim(bottom=min(row["GOP/s"] for row in rows) / 2)
    for panel in list(panels.flat)[len(shapes) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("GOP/s (best sample)")
    for panel in list(panels.flat)[max(0, len(shapes) - wide) : len(shapes)]:
        panel.set_xlabel("operations per byte of weight")
        panel.tick_params(labelbottom=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=min(5, len(labels)), frameon=False)
    figure.suptitle(
        f"{facts['cpu']}, {facts['isa']}, {facts['threads']} "
        f"thread{'s' if facts['threads'] > 1 else ''}, "
        f"commit {facts['commit'][:10]}",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.09 / high, 1, 1 - 0.04 / high))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(
    panel: Any, rows: list[dict[str, Any]], kernels: list[str], facts: dict[str, Any]
) -> None:
    """The limits and one line a kernel; token counts of the first of ours stand on the axis."""
    read = max(row["read GB/s"] for row in rows)
    roof = max((row["multiply GOP/s"] or 0 for row in rows), default=0)
    intensities = [_intensity(row) for row in rows]
    left, right = min(intensities) / 1.6, max(intensities) * 1.6
    top = roof or read * right
    panel.loglog([left, top / read], [left * read, top], color="black", lw=1.2)
    middle = (left * top / read) ** 0.5
    label = f"read {read:.0f} GB/s "
    panel.annotate(label, (middle, middle * read), fontsize=8, ha="right", va="bottom")
    if roof:
        panel.loglog([roof / read, right], [roof, roof], color="black", lw=1.2)
        label = f"{facts['multiply']} {roof:.0f} GOP/s"
        panel.annotate(label, (right, roof * 1.06), fontsize=8, ha="right")
    first = next((kernel for kernel in kernels if kernel.startswith("ternc")), None)
    for i, kernel in enumerate(kernels):
        own = [row for row in rows if row["kernel"] == kernel]
        if not own:
            continue
        ours = kernel.startswith("ternc")
        panel.loglog(
            [_intensity(row) for row in own],
            [row["GOP/s"] for row in own],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            lw=2.0 if ours else 1.0,
            ls="-" if ours else "--",
            ms=5,
            label=kernel,
        )
        if kernel == first:
            _mark_tokens(panel, own)
    panel.grid(which="major", color="#dddddd", lw=0.6)


def _mark_tokens(panel: Any, rows: list[dict[str, Any]]) -> None:
    """A thin line down from every point, and its token count at the foot of the panel."""
    for row in rows:
        x = _intensity(row)
        panel.axvline(x, color="#bbbbbb", lw=0.7, ls=":", zorder=0)
        panel.annotate(
            f"{row['tokens']}",
            (x, 0.015),
            xycoords=panel.get_xaxis_transform(),
            fontsize=8,
            ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    first = min(map(_intensity, rows))
    panel.annotate(
        "tokens", (first / 1.6, 0.015), xycoords=panel.get_xaxis_transform(), fontsize=8, ha="right"
    )


def _intensity(row: dict[str, Any]) -> float:
    """Operations a byte of weight: two a weight and token."""
    return 2 * row["tokens"] * 8 / row["bits/w"]
