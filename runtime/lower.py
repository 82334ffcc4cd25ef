"""Rewritten graph -> callable: Inductor compiles it once, packed weights are handed in at every
call.

The compiled code never holds a weight. Each call finds the packed form of the weights it was
given; where one needs another variant than the graph was compiled for, that call runs the graph op
by op, with one warning.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ternc.errors import DifferentiationError
from ternc.formats.rotation import SharedSigns
from ternc.reporting import GraphNode, Row
from ternc.runtime.dynamo import Part
from ternc.runtime.identity import Known
from ternc.runtime.inductor import keep_static
from ternc.runtime.op_by_op import OpByOp
from ternc.runtime.pack import PackCache, PackedWeight
from ternc.runtime.states import state_of
from ternc.site import TrainedWeight, WeightSite

CACHE = PackCache()
GRAPHS: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_ORDER = itertools.count()


@dataclasses.dataclass(frozen=True)
class Argument:
    """Where one input of the rewritten graph comes from: an original input, a field of a site, or
    neither.
    """

    position: int = -1
    site: int = -1
    field: str = ""
    constant: torch.Tensor | None = None
    """Signs of a rotation, the same at every call."""
    trained: TrainedWeight | None = None
    """Whose state it is, where it is one."""


class CompiledGraph:
    """One compiled graph, shared by every instance that Dynamo runs it for.

    Attributes:
        rows: report rows at compile time.
        sites: weights that are packed, in the order of the rows.
        trained: weights that are fake-quantised and trained.
        order: rises with every graph compiled in this process.
        notes: what happened at run time that a report should say.
        options: what the backend was given.
        part: of the model as Dynamo traced it.
        sources: position of each static input -> the Python expression that it came from.
        nodes_before: the graph as it came from Dynamo, as plain data for the report.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: list[WeightSite],
        rows: list[Row],
        row_positions: list[tuple[Row, int]],
        trained: list[TrainedWeight],
        inputs: Sequence[Any],
        inner: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
        abstract: bool,
        differentiable: bool,
        nodes_before: list[GraphNode],
    ) -> None:
        self.sites = sites
        self.rows = rows
        self.row_positions = row_positions
        self.trained = trained
        self.nodes_before = nodes_before
        self.notes: list[str] = []
        self.options: dict[str, Any] = {}
        self.part = Part(None, None)
        self._abstract = abstract
        self._differentiable = differentiable
        self._warned: set[str] = set()
        self._instances: list[dict[int, Known]] = []
        self.graph_module = gm
        self.sources = {
            node.meta["ternc_position"]: node.meta.get("ternc_source", "")
            for node in gm.graph.find_nodes(op="placeholder")
            if node.meta.get("ternc_static")
        }
        self._arguments = _plan(gm, sites)
        self._select = _selection(self._arguments)
        entries = [
            _abstract_entry(s, inputs) if abstract else self._entry(s, inputs) for s in sites
        ]
        if not abstract:
            self._remember(inputs)
        gathered = self._gather(inputs, entries)
        keep_static([v for v, a in zip(gathered, self._arguments, strict=True) if a.position < 0])
        self._inner = inner(gm, gathered)
        self.order = next(_ORDER)
        GRAPHS.add(self)

    def __call__(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(args)
        if self._abstract and any(isinstance(value, FakeTensor) for value in args):
            # DDP's splitter calls every part once on fake tensors, for the strides of its outputs.
            entries = [_abstract_entry(site, args) for site in self.sites]
            return self._inner(*self._gather(args, entries))
        if self.trained and not self._knows(args):
            self._remember(args)
        entries = [self._entry(site, args) for site in self.sites]
        for site, entry in zip(self.sites, entries, strict=True):
            if entry.variant != site.variant:
                return self._run_op_by_op(args, entries)
        gathered = self._gather(args, entries)
        if self._differentiable:
            return self._inner(*gathered)
        # The ops' autograd is Python: without gradients it costs 4 to 6 us a call for nothing.
        with torch._C._AutoDispatchBelowAutograd():
            return self._inner(*gathered)

    def instances_of(self, tensors: Mapping[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
        """Of every instance seen whose weights all live: those of `tensors` that are its static
        inputs, by their position among the inputs. Instances that have none are left out.

        Args:
            tensors: by identity.
        """
        needed = {position for site in self.sites for position in site.inputs}
        needed.update(position for _, position in self.row_positions)
        found = []
        for instance in self._instances:
            if all(instance[position].alive for position in needed):
                given = {p: tensors.get(known.identity) for p, known in instance.items()}
                own = {p: t for p, t in given.items() if t is not None and instance[p](t)}
                found += [own] if own else []
        return found

    def _entry(self, site: WeightSite, args: Sequence[Any]) -> PackedWeight:
        sources = [args[position] for position in site.inputs]
        entry = CACHE.find(site, sources)
        if entry is None:
            entry = CACHE.pack(site, sources, site.first)
            self._remember(args)
        site.first = None  # true of the weight at compilation alone, packed by another graph or not
        return entry

    def _knows(self, args: Sequence[Any]) -> bool:
        """Whether the first weight that is trained is that of an instance seen before."""
        position = self.trained[0].position
        seen = (instance.get(position) for instance in self._instances)
        return any(known is not None and known(args[position]) for known in seen)

    def _remember(self, args: Sequence[Any]) -> None:
        static = {
            position: args[position]
            for position in self.sources
            if isinstance(args[position], torch.Tensor)
        }
        for seen in self._instances:
            if all(known(static.get(position)) for position, known in seen.items()):
                return
        alive = [i for i in self._instances if any(known.alive for known in i.values())]
        self._instances = [*alive, {p: Known(tensor) for p, tensor in static.items()}]

    def _gather(self, args: Sequence[Any], entries: Sequence[PackedWeight]) -> list[Any]:
        if self._select is not None:
            return list(self._select(args))
        gathered: list[Any] = []
        for argument in self._arguments:
            if argument.constant is not None:
                gathered.append(argument.constant)
            elif argument.trained is not None:
                gathered.append(_state(argument.trained, argument.field, args))
            elif argument.site < 0:
                gathered.append(args[argument.position])
            else:
                gathered.append(getattr(entries[argument.site].packed, argument.field, None))
        return gathered

    def _run_op_by_op(self, args: Sequence[Any], entries: Sequence[PackedWeight]) -> Any:
        for site, entry in zip(self.sites, entries, strict=True):
            if entry.variant != site.variant and site.name not in self._warned:
                self._warned.add(site.name)
                note = (
                    f"{site.name}: the weight no longer fits the compiled form "
                    f"({site.row.format}); now: {entry.reason}. It runs op by op, right but "
                    "unfused; ternc.repack(model, recompile=True) compiles it anew"
                )
                self.notes.append(note)
                warnings.warn(f"ternc: {note}", RuntimeWarning, stacklevel=3)
        by_site = {id(s): (s, e) for s, e in zip(self.sites, entries, strict=True)}
        return OpByOp(self.graph_module, by_site, args).run(*self._gather(args, entries))


def _refuse_tangents(args: Sequence[Any]) -> None:
    """Raises DifferentiationError where an input has a forward-mode tangent: it would be lost."""
    for value in args:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise DifferentiationError(
                "a compiled graph has no derivatives in forward mode; call the model uncompiled, "
                "or use torch.func.jvp"
            )


def _plan(gm: fx.GraphModule, sites: list[WeightSite]) -> list[Argument]:
    """Drops static inputs that nothing reads any more; says where the remaining ones come from."""
    order = {id(site): i for i, site in enumerate(sites)}
    plan = []
    for node in gm.graph.find_nodes(op="placeholder"):
        if "ternc_packed" in node.meta:
            source, field = node.meta["ternc_packed"]
            if isinstance(source, SharedSigns):
                plan.append(Argument(constant=source.tensor()))
            else:
                plan.append(Argument(site=order[id(source)], field=field))
        elif "ternc_state" in node.meta:
            trained, field = node.meta["ternc_state"]
            plan.append(Argument(field=field, trained=trained))
        elif node.meta["ternc_static"] and not node.users:
            gm.graph.erase_node(node)
        else:
            plan.append(Argument(position=node.meta["ternc_position"]))
    gm.recompile()
    return plan


def _selection(arguments: list[Argument]) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
    """The inputs of a graph that only passes on what it is given; 70 us less than a loop over 235.

    None where a site, a state or a constant is among them, or fewer than two inputs.
    """
    positions = [argument.position for argument in arguments]
    return operator.itemgetter(*positions) if len(positions) > 1 and min(positions) >= 0 else None


def _abstract_entry(site: WeightSite, inputs: Sequence[Any]) -> PackedWeight:
    """Packed tensors without values, for a graph that is compiled from fake tensors."""
    packed = site.empty_packed(inputs[site.inputs[0]])
    return PackedWeight((), site.row.reason, None, packed, site.variant)


def _state(trained: TrainedWeight, field: str, args: Sequence[Any]) -> torch.Tensor:
    """The state of a trained weight; one without values where its Parameter is fake."""
    parameter = args[trained.position]
    if isinstance(parameter, FakeTensor):
        return parameter.new_empty(3, dtype=torch.float32, device="cpu", requires_grad=False)
    return getattr(state_of(parameter, trained.key, trained.activation_bits), field)
