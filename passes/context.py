"""What the rules know about one compilation, and where they leave what they found."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from ternc.config import Config
from ternc.passes.graph import calling_module, mode_switches, module_path, source_of
from ternc.passes.rule import Skip
from ternc.reporting import GraphNode, Row
from ternc.site import TrainedWeight, WeightSite


@dataclasses.dataclass
class Context:
    """Attributes:
    config: the user's settings.
    inputs: example inputs of the original graph, by position.
    grad_enabled: gradients were enabled when the graph was traced.
    abstract: the inputs are fake tensors (DDP buckets); no value may be read.
    """

    config: Config
    inputs: list[Any]
    grad_enabled: bool
    abstract: bool
    sites: list[WeightSite] = dataclasses.field(default_factory=list)
    trained: list[TrainedWeight] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    tainted: set[fx.Node] = dataclasses.field(default_factory=set)
    """Nodes whose storage the graph writes in place: no read of them may move."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Facts for the report that belong to no single weight."""
    packed_inputs: list[tuple[WeightSite, str]] = dataclasses.field(default_factory=list)
    """Inputs appended to the graph: which site, which field of its packed tensors."""
    row_positions: list[tuple[Row, int]] = dataclasses.field(default_factory=list)
    """Rows of weights that were packed before compilation, and the position of their bytes."""
    int8: set[tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=set)
    """Weights asked for as int8: positions and key of their expressions."""
    nodes_before: list[GraphNode] = dataclasses.field(default_factory=list)
    """The graph before the first pass, as plain data for the report."""

    def why_not_move(self, *read: fx.Node | None) -> Skip | None:
        """A refusal where a tensor that a rule would read elsewhere is written in place."""
        for node in read:
            if node is not None and node in self.tainted:
                return Skip(f"{node} is written in place", node)
        return None

    def why_not_join(self, first: fx.Node, last: fx.Node) -> Skip | None:
        """A refusal where gradients or autocast are switched between two nodes."""
        for node in mode_switches(first.graph):
            if first < node < last:
                return Skip(f"{node} switches gradients or autocast in between", node)
        return None

    def skip(self, name: str, pattern: str, why: Skip, weight: torch.Tensor | None) -> None:
        """Adds the row of a weight that stays floating point."""
        self.rows.append(skipped_row(name, pattern, why.reason, weight))

    def unique_name(self, name: str) -> str:
        """`name`, numbered where a row has it already."""
        taken = {row.name for row in self.rows}
        if name not in taken:
            return name
        return next(f"{name}#{i}" for i in range(2, len(taken) + 3) if f"{name}#{i}" not in taken)


def skipped_row(name: str, pattern: str, reason: str, weight: torch.Tensor | None) -> Row:
    """Row of a weight that stays what it is."""
    nbytes = 0 if weight is None else weight.numel() * weight.element_size()
    return Row(
        name=name,
        pattern=pattern,
        action="skipped",
        reason=reason,
        shape=() if weight is None else tuple(int(size) for size in weight.shape),
        bytes_before=nbytes,
        bytes_after=nbytes,
        bytes_at_rest=nbytes,
        bits_per_weight=0.0 if weight is None else 8.0 * weight.element_size(),
    )


def weight_name(user: fx.Node, weight: fx.Node, inputs: list[fx.Node]) -> str:
    """Path of the layer that a weight belongs to: the parameter's owner, with the name of its
    slice.

    A parameter that lives elsewhere (a tied weight) is named after the module that uses it.
    """
    caller = calling_module(user)
    path = module_path(source_of(inputs[0])) if inputs else caller or str(weight)
    if caller and path != caller and not path.startswith(f"{caller}."):
        path = caller
    suffix = weight.meta.get("ternc_suffix")
    return f"{path}.{suffix}" if suffix else path
