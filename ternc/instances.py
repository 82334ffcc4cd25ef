"""Compiled graphs -> what they are to one model: its tensors among their inputs, report rows as the
weights are and run now, under the model's own names.

Dynamo names what it finds from where it started, and runs one graph for many modules: where blocks
are compiled one by one, a row `mlp.up` of the graph is `layers.3.mlp.up` of the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ternc.passes.graph import dotted_path
from ternc.reporting import Row
from ternc.runtime import dispatch
from ternc.runtime.lower import CACHE, GRAPHS, CompiledGraph
from ternc.site import WeightSite


@dataclasses.dataclass(frozen=True)
class Instance:
    """A compiled graph that has run with tensors of a model."""

    graph: CompiledGraph
    tensors: dict[int, torch.Tensor]
    """Those of the model, by their position among the inputs of the graph."""
    added: str = ""
    """Stands before the names of the graph in those of the model, "layers.3."."""
    removed: str = ""
    """Stands before the names of the model in those of the graph: it is a part of what ran."""

    def name(self, name: str) -> str | None:
        """A name of the graph as the model has it; None for what is no part of the model."""
        if not name.startswith(self.removed):
            return None
        return self.added + name[len(self.removed) :]

    def rows(self) -> Iterator[Row]:
        """Rows of the graph, with what the model's weights are and run as now."""
        sites = {id(site.row): site for site in self.graph.sites}
        packed_before = {id(row): position for row, position in self.graph.row_positions}
        for row in self.graph.rows:
            if (name := self.name(row.name)) is None:
                continue
            shared = None if row.shared_with is None else self.name(row.shared_with)
            current = dataclasses.replace(row, name=name, shared_with=shared)
            if packed_before.get(id(row)) in self.tensors:
                current.kernel = dispatch.last_kernel(self.tensors[packed_before[id(row)]])
            elif id(row) in sites:
                _update(current, sites[id(row)], self.tensors)
            yield current

    def replaced(self) -> Iterator[torch.Tensor]:
        """Float weights of the model that nothing but packed sites reads."""
        return replaced(still_read(self.graph.graph_module), self.graph.sites, self.tensors)

    def kept(self) -> set[str]:
        """Rows whose float weight something else reads too."""
        read = still_read(self.graph.graph_module)
        names = (self.name(name) for name in kept(read, self.graph.sites))
        return {name for name in names if name is not None}


def instances_of(model: torch.nn.Module) -> list[Instance]:
    """Every compiled graph that has run with tensors of this model, in the order of compilation."""
    own: dict[int, torch.Tensor] = {}
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        own[id(tensor)] = tensor
        names[id(tensor)].append(name)
    found = []
    for graph in sorted(GRAPHS, key=lambda graph: graph.order):
        sources = {position: dotted_path(text) for position, text in graph.sources.items()}
        for tensors in graph.instances_of(own):
            pairs = ((sources[p], names[id(tensor)]) for p, tensor in tensors.items())
            found.append(Instance(graph, tensors, *_place(pairs)))
    return found


def still_read(gm: fx.GraphModule) -> set[int]:
    """Positions of the original inputs that the rewritten graph still reads."""
    return {
        node.meta["ternc_position"]
        for node in gm.graph.find_nodes(op="placeholder")
        if node.users and "ternc_position" in node.meta
    }


def replaced(
    read: set[int], sites: Sequence[WeightSite], inputs: Mapping[int, Any]
) -> Iterator[torch.Tensor]:
    """Float weights that nothing but packed sites reads: what the packed bytes stand for."""
    for site in sites:
        yield from (inputs[p] for p in site.inputs if p in inputs and p not in read)


def kept(read: set[int], sites: Sequence[WeightSite]) -> set[str]:
    """Sites whose float weight something else reads too."""
    return {site.name for site in sites if read.issuperset(site.inputs)}


def _place(pairs: Iterable[tuple[str, Sequence[str]]]) -> tuple[str, str]:
    """`added` and `removed` of most tensors, from (name in the graph, names in the model)."""
    votes: Counter[tuple[str, str]] = Counter()
    for source, names in pairs:
        for name in names:
            if name == source:
                return "", ""
            if name.endswith(f".{source}"):
                votes[name.removesuffix(source), ""] += 1
            elif source.endswith(f".{name}"):
                votes["", source.removesuffix(name)] += 1
    return votes.most_common(1)[0][0] if votes else ("", "")


def _update(row: Row, site: WeightSite, tensors: Mapping[int, torch.Tensor]) -> None:
    if not tensors.keys() >= set(site.inputs):
        return  # a weight from outside the model
    entry = CACHE.peek(site, [tensors[position] for position in site.inputs])
    if entry is None:
        return
    if entry.packed is None:
        row.action, row.reason, row.format = "skipped", entry.reason, "float"
        row.bytes_after = row.bytes_at_rest = row.bytes_before
        row.bits_per_weight = 8.0 * row.bytes_before / max(1, row.shape[0] * row.shape[1])
        row.weight_error = None
        return
    row.bytes_after, row.bytes_at_rest = entry.packed.nbytes, entry.packed.nbytes_at_rest
    row.bits_per_weight = 8.0 * row.bytes_after / max(1, row.shape[0] * row.shape[1])
    row.weight_error = entry.error
    if entry.variant != site.variant:
        row.reason = f"{entry.reason}; runs op by op: compiled as {site.row.format}"
    row.kernel = dispatch.last_kernel(entry.packed.weight)
