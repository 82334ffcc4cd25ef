"""`Report`: what was done to every layer, and why. Data first; table, JSON, graph are views."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import networkx

_HEADERS = (
    "layer",
    "found",
    "format",
    "shape",
    "bits",
    "before",
    "after",
    "w.error",
    "out.error",
    "kernel",
    "reason",
)
_LAYER_WIDTH, _FOUND_WIDTH, _REASON_WIDTH, _LINE_WIDTH = 40, 24, 50, 100


@dataclasses.dataclass
class Row:
    """One weight found (each Linear under its own module path) or one attention region."""

    name: str
    """Module path, `layers.3.mlp.up`."""
    pattern: str
    """What was found, with fused partners: `linear`, `multihead_attention.in_proj`, ..."""
    action: Literal["rewritten", "skipped"]
    reason: str
    """Why, in words a user understands; never empty."""
    format: str = "float"
    """`ternary x3 g128 a8`, `float`, ..."""
    shape: tuple[int, ...] = ()
    """Shape of the float weight, (N, K)."""
    bytes_before: int = 0
    bytes_after: int = 0
    """Bytes of the resident buffers that replace the weight (bytes_before when skipped)."""
    bytes_at_rest: int = 0
    """Bytes of the same weight in a state_dict or file."""
    bits_per_weight: float = 0.0
    """8 * bytes_after / number of weights."""
    weight_error: float | None = None
    """||W - Q|| / ||W||, Frobenius."""
    output_error: float | None = None
    """Relative error of the layer's output on calibration data."""
    kernel: str | None = None
    """Kernel that the last call really ran; None before the first call."""
    shared_with: str | None = None
    """Name of the row whose buffers this layer shares (tied weights): counted there, not here."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Totals:
    """The whole model: every parameter and buffer once, embeddings and norms included."""

    weights: int
    """Elements of the model as it was found."""
    bytes_before: int
    """Resident bytes as found."""
    bytes_after: int
    """Resident bytes when every rewritten weight is held once, packed."""
    bytes_at_rest: int
    """Bytes of the same model in a state_dict or file."""

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        rows: Sequence[Row],
        replaced: Iterable[torch.Tensor],
        kept: Collection[str] = (),
    ) -> Totals:
        """Totals of `model` given its report rows.

        Args:
            model: the float model or the quantised one.
            rows: its report rows; only those with action "rewritten" count.
            replaced: the tensors of `model` that those rows stand for (the float weights of a
                float model, the packed buffers of a quantised one); the rest is counted as it is.
            kept: names of rows whose float weight something else still reads (an embedding tied
                to a head): the packed copy comes on top of it.
        """
        held = {_storage(tensor) for tensor in replaced}
        rest = [tensor for tensor in _unique(model) if _storage(tensor) not in held]
        rest_bytes = sum(_bytes(tensor) for tensor in rest)
        counted = [
            row
            for row in rows
            if row.action == "rewritten" and row.shared_with is None and row.shape
        ]
        moved = [row for row in counted if row.name not in kept]
        return cls(
            weights=sum(t.numel() for t in rest) + sum(math.prod(row.shape) for row in moved),
            bytes_before=rest_bytes + sum(row.bytes_before for row in moved),
            bytes_after=rest_bytes + sum(row.bytes_after for row in counted),
            bytes_at_rest=rest_bytes + sum(row.bytes_at_rest for row in counted),
        )

    @property
    def bits_per_weight(self) -> float:
        """Resident bits per element of the whole model."""
        return 8 * self.bytes_after / self.weights if self.weights else 0.0

    @property
    def ratio_fp32(self) -> float:
        """How many times smaller than the whole model in fp32, resident."""
        return 4 * self.weights / self.bytes_after if self.bytes_after else 0.0

    @property
    def ratio_bf16(self) -> float:
        """How many times smaller than the whole model in bf16, resident."""
        return 2 * self.weights / self.bytes_after if self.bytes_after else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Fields and ratios as plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "bits_per_weight": self.bits_per_weight,
            "ratio_fp32": self.ratio_fp32,
            "ratio_bf16": self.ratio_bf16,
        }


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One node of a traced graph, without its tensors."""

    name: str
    op: str
    """The node kind of torch.fx: placeholder, call_function, ..."""
    target: str
    inputs: tuple[str, ...]
    layer: str | None = None
    """Module path of the layer the node belongs to; None for the whole model."""
    value: str = ""
    """What it computes, `float32[2, 12, 64]`; empty where unknown."""
    weight: bool = False
    """A graph input that is a parameter, a buffer or a packed tensor."""


@dataclasses.dataclass
class Report:
    """What was found in a model, what was done to it, and what it weighs."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    totals: Totals | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    """Facts about the whole model, e.g. that float and packed copies are both in memory."""
    status: str = ""
    """Why there is nothing to report yet; empty when there is."""
    nodes: list[GraphNode] = dataclasses.field(default_factory=list)
    """The rewritten graph as plain data; `graph` is the same as a networkx graph."""
    nodes_before: list[GraphNode] = dataclasses.field(default_factory=list)
    """The graph as Dynamo traced it, before anything was rewritten."""

    @property
    def rewritten(self) -> list[Row]:
        """Rows whose weight now is packed."""
        return [row for row in self.rows if row.action == "rewritten" and row.shape]

    @property
    def attention(self) -> list[Row]:
        """Rows of attention regions: they name their projections, and have no weight."""
        return [row for row in self.rows if row.pattern.startswith("attention: ")]

    @property
    def skipped(self) -> list[Row]:
        """Rows left as they were."""
        regions = {id(row) for row in self.attention}
        return [r for r in self.rows if r.action == "skipped" and id(r) not in regions]

    @property
    def reference_rows(self) -> list[Row]:
        """Rewritten rows whose last call ran the eager reference instead of a kernel."""
        return [row for row in self.rewritten if row.kernel == "reference"]

    @property
    def graph(self) -> networkx.DiGraph | None:
        """The rewritten graph, edges from producer to user; None when nothing was traced."""
        if not self.nodes:
            return None
        import networkx

        graph = networkx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.name, op=node.op, target=node.target, layer=node.layer)
        graph.add_edges_from((source, node.name) for node in self.nodes for source in node.inputs)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON types."""
        return {
            "status": self.status,
            "totals": self.totals.to_dict() if self.totals else None,
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
            "graph": [dataclasses.asdict(node) for node in self.nodes],
            "graph_before": [dataclasses.asdict(node) for node in self.nodes_before],
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to `path`. Raises OSError when it cannot be written."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_html(self, path: str | Path, *, title: str = "", bandwidth: float | None = None) -> None:
        """Write one self-contained page: totals, layers, refusals, graphs before and after.

        Args:
            title: what the page is about, the name of the model.
            bandwidth: bytes a second that the memory of the machine can be read at; None where
                it is not known, and the page then says so.

        Raises:
            OSError: the file cannot be written.
        """
        from ternc.html_report import render

        page = render(self, title=title, bandwidth=bandwidth)
        Path(path).write_text(page, encoding="utf-8")

    def __str__(self) -> str:
        parts = [self.status] if self.status else []
        if self.rewritten:
            parts.append(_table(self.rewritten))
        if self.skipped:
            parts.append(_refusals(self.skipped))
        if self.attention:
            parts.append(_attention(self.attention))
        if self.rows or self.totals:
            parts.append(_summary(self))
        parts += [_wrapped(f"note: {note}", "      ") for note in self.notes]
        return "\n\n".join(parts) if parts else "no layer found"


def model_bytes(model: torch.nn.Module) -> int:
    """Resident bytes of all parameters and buffers, each storage once (tied weights count once)."""
    return sum(_bytes(tensor) for tensor in _unique(model))


def format_bytes(count: int) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _unique(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    seen = set()
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            if torch.nn.parameter.is_lazy(tensor):
                continue  # no storage yet
            if (key := _storage(tensor)) not in seen:
                seen.add(key)
                yield tensor


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a tensor; works for meta and fake tensors too."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes())


def _table(rows: list[Row]) -> str:
    import tabulate

    cells = [
        (
            _broken(row.name, _LAYER_WIDTH),
            _broken(row.pattern, _FOUND_WIDTH),
            row.format,
            "x".join(map(str, row.shape)) or "-",
            f"{row.bits_per_weight:.2f}" if row.shape else "-",
            format_bytes(row.bytes_before) if row.shape else "-",
            "shared" if row.shared_with else format_bytes(row.bytes_after) if row.shape else "-",
            _error(row.weight_error),
            _error(row.output_error),
            row.kernel or "-",
            textwrap.fill(row.reason, _REASON_WIDTH),
        )
        for row in rows
    ]
    align = ("left",) * 4 + ("right",) * 5 + ("left",) * 2
    text = tabulate.tabulate(
        cells, _HEADERS, tablefmt="simple", colalign=align, disable_numparse=True
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def _refusals(rows: list[Row]) -> str:
    """Skipped rows, one paragraph for each reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.reason, row.pattern), []).append(row.name)
    lines = [f"left as they were ({len(rows)}):"]
    for (reason, pattern), names in groups.items():
        lines.append(_wrapped(f"  {pattern}: {reason}", "    "))
        lines.append(_wrapped("    " + ", ".join(names), "    "))
    return "\n".join(lines)


def _attention(rows: list[Row]) -> str:
    """Attention regions, one line for each pattern."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.pattern.removeprefix("attention: "), []).append(row.name)
    lines = [f"attention regions ({len(rows)}):"]
    lines += [_wrapped(f"  {p}: {', '.join(names)}", "    ") for p, names in groups.items()]
    return "\n".join(lines)


def _summary(report: Report) -> str:
    weights = len(report.rewritten) + len(report.skipped)
    line = f"{len(report.rewritten)} of {weights} rewritten."
    if totals := report.totals:
        line += (
            f" Whole model: {format_bytes(totals.bytes_before)} -> "
            f"{format_bytes(totals.bytes_after)} in memory, "
            f"{format_bytes(totals.bytes_at_rest)} at rest; "
            f"{totals.bits_per_weight:.2f} bits per weight with embeddings; "
            f"{totals.ratio_fp32:.2f}x smaller than fp32, {totals.ratio_bf16:.2f}x than bf16."
        )
    return _wrapped(line, "")


def _error(value: float | None) -> str:
    return "-" if value is None else "exact" if value == 0 else f"{value:.4f}"


def _broken(name: str, width: int) -> str:
    """Break a long dotted name after its dots."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _LINE_WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
