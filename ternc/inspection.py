"""Questions about a model: `explain` (what would be done), `report` (what was done), `repack` (do
it again).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ternc.backend import parse_options, rewrite
from ternc.config import Config, checked_config
from ternc.errors import UnsupportedModelError
from ternc.instances import instances_of, kept, replaced, still_read
from ternc.module_sites import glob_names
from ternc.modules.conversion import packed_row
from ternc.modules.linear import TernaryLinear
from ternc.passes.context import skipped_row
from ternc.passes.describe import describe_graph, prefixed
from ternc.policy import refuse_live, unmatched
from ternc.reporting import GraphNode, Report, Row, Totals
from ternc.runtime import dispatch, ops
from ternc.runtime.dynamo import (
    Part,
    options_of,
    part_of,
    split_notes,
    uncompiled,
    without_limits,
)
from ternc.runtime.lower import CACHE
from ternc.site import TrainedWeight

_NOT_COMPILED = (
    "not compiled yet: call the compiled model once, or ask ternc.explain(model, inputs); after a "
    "call, Dynamo left all of it to Python (TORCH_LOGS=graph_breaks says why)"
)
_UNREACHED = (
    "in no compiled graph: not called so far, or in code that Dynamo left to Python "
    "(TORCH_LOGS=graph_breaks says why)"
)
_TWICE = (
    "the float weights stay in memory beside the packed ones ({total}): the compiled model may be "
    "trained or loaded again; ternc.quantize(model) keeps the packed ones alone"
)
_TRAINING = (
    "gradients are enabled, so weights that require grad run the quantisation-aware training op; "
    "call the model under torch.no_grad() or torch.inference_mode() for the packed kernels"
)


def explain(
    model: torch.nn.Module, *args: Any, config: Config | None = None, **kwargs: Any
) -> Report:
    """What `torch.compile(model, backend="ternc")` would do with `model(*args, **kwargs)`.

    Runs the model once, uncompiled, in the caller's gradient mode; neither the model nor its
    weights are changed.

    Args:
        config: the settings to explain; default `Config()`.

    Raises:
        UnsupportedModelError: `model` is not a module.
        ConfigError: `config` is not a `Config`, or has a setting that only `quantize` obeys.
    """
    config = checked_config(config)
    refuse_live(config)
    model = uncompiled(model)
    ops.register()
    rows: list[Row] = []
    nodes: list[GraphNode] = []
    nodes_before: list[GraphNode] = []
    taken: list[torch.Tensor] = []
    doubled: set[str] = set()
    found: list[str] = []
    read: set[int] = set()
    parts: list[Part] = []
    _check_module(model)

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten, context = rewrite(gm, inputs, config)
        prefix = _prefix(len(parts))
        rows.extend(context.rows)
        nodes.extend(describe_graph(rewritten.graph, prefix))
        nodes_before.extend(prefixed(context.nodes_before, prefix))
        reads = still_read(rewritten)
        taken.extend(replaced(reads, context.sites, dict(enumerate(inputs))))
        doubled.update(kept(reads, context.sites))
        read.update(map(id, inputs))
        found.extend(note for note in context.notes if note not in found)
        parts.append(part_of(gm))
        return gm.forward

    with without_limits():
        torch.compile(model, backend=record)(*args, **kwargs)
    rows = list(_as_held(rows, model))
    rows.extend(_unreached(model, read, rows))
    taken.extend(_packed_buffers(model, rows))
    totals = Totals.of(model, _packed(rows), taken, doubled)
    taken.clear()  # Dynamo keeps `record`, which must not keep the weights alive
    return Report(
        rows=rows,
        totals=totals,
        notes=[
            *_notes(rows),
            *split_notes(parts),
            *found,
            *unmatched(config, glob_names(model, rows)),
        ],
        nodes=nodes,
        nodes_before=nodes_before,
    )


def report(model: torch.nn.Module) -> Report:
    """What was done to `model`: by `ternc.quantize`, and by the backend once the compiled model
    has run.

    Raises:
        UnsupportedModelError: `model` is not a module.
    """
    options = options_of(model)
    model = uncompiled(model)
    _check_module(model)
    packed = getattr(model, "_ternc_rows", None)
    instances = instances_of(model)
    if options is not None:  # one model may be compiled in several ways
        instances = [found for found in instances if found.graph.options == options]
    if packed is None and not instances:
        return Report(status=_NOT_COMPILED)
    rows: dict[str, Row] = {}
    taken: list[torch.Tensor] = []
    doubled: set[str] = set()
    notes: list[str] = []
    nodes: list[GraphNode] = []
    nodes_before: list[GraphNode] = []
    for instance in instances:
        for row in _as_held(instance.rows(), model):
            if not (_trains(row) and row.name in rows):  # what is packed for inference stays so
                rows[row.name] = row
        taken.extend(instance.replaced())
        doubled.update(instance.kept())
    for index, graph in enumerate(dict.fromkeys(instance.graph for instance in instances)):
        notes.extend(note for note in graph.notes if note not in notes)
        nodes.extend(describe_graph(graph.graph_module.graph, _prefix(index)))
        nodes_before.extend(prefixed(graph.nodes_before, _prefix(index)))
    if packed is not None:
        for row in packed:
            compiled = rows.get(row.name)
            if row.action == "rewritten" or compiled is None or compiled.action == "skipped":
                rows[row.name] = _as_run(row, compiled, model)
    found = list(rows.values())
    taken.extend(_packed_buffers(model, found))
    if packed is None:
        read = {id(tensor) for instance in instances for tensor in instance.tensors.values()}
        found.extend(_unreached(model, read, found))
    held_packed = {row.name for row in packed or () if row.action == "rewritten"}
    return Report(
        rows=found,
        totals=Totals.of(model, _packed(found), taken, doubled),
        notes=[
            *_notes([row for row in found if row.name not in held_packed]),
            *split_notes(instance.graph.part for instance in instances),
            *notes,
            *_unmatched(model, found, options),
        ],
        nodes=nodes,
        nodes_before=nodes_before,
    )


def trained_weights(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, TrainedWeight]]:
    """Weights that compiled graphs of `model` fake-quantise and train, one entry a weight, in the
    order of the parameters.
    """
    found: dict[tuple[int, str], tuple[torch.nn.Parameter, TrainedWeight]] = {}
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    for instance in instances_of(model):
        for trained in instance.graph.trained:
            parameter = parameters.get(id(instance.tensors.get(trained.position)))
            name = instance.name(trained.name)
            if parameter is not None and name is not None:
                named = dataclasses.replace(trained, name=name)
                found.setdefault((id(parameter), trained.key), (parameter, named))
    order = {identity: index for index, identity in enumerate(parameters)}
    return [found[key] for key in sorted(found, key=lambda key: order[key[0]])]


def repack(model: torch.nn.Module, recompile: bool = False) -> int:
    """Packs the weights of `model` anew at its next call: for writes that leave no trace,
    `p.data.copy_()`.

    Args:
        recompile: also drop compiled code (of every model in the process), so that decisions are
        made anew.

    Returns:
        Number of packed weights that were marked.

    Raises:
        UnsupportedModelError: `model` is not a module.
    """
    _check_module(model)
    count = CACHE.forget([*model.parameters(), *model.buffers()])
    if recompile:
        torch._dynamo.reset()
    return count


def _check_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"this takes a torch.nn.Module, not a {type(model).__name__}: "
            "pass the module whose weights the compiled function reads"
        )


def _unreached(model: torch.nn.Module, read: set[int], rows: Sequence[Row]) -> Iterator[Row]:
    """Linear layers whose weight is none of the tensors that compiled graphs were given."""
    known = {row.name for row in rows}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in read or name in known:
            continue
        if isinstance(module, torch.nn.Linear):
            yield skipped_row(name, "linear", _UNREACHED, weight)


def _unmatched(
    model: torch.nn.Module, rows: Sequence[Row], options: Mapping[str, Any] | None
) -> list[str]:
    """Notes on globs without a match: of `quantize`'s configuration, of the backend's options."""
    offline = getattr(model, "_ternc_config", None)
    configs = ([offline] if offline else []) + ([parse_options(options)[0]] if options else [])
    names = glob_names(model, rows)
    return list(dict.fromkeys(note for config in configs for note in unmatched(config, names)))


def _notes(rows: list[Row]) -> list[str]:
    notes = []
    packed = [row for row in rows if row.action == "rewritten" and row.shape]
    live = [row for row in packed if "packed " not in row.pattern]
    if any(_trains(row) for row in live):
        notes.append(_TRAINING)
    elif live:
        total = sum(row.bytes_before for row in live) + sum(row.bytes_after for row in live)
        notes.append(_TWICE.format(total=f"{total / 1e6:.1f} MB"))
    return notes


def _trains(row: Row) -> bool:
    """Whether the row is of a weight that a graph fake-quantises and trains."""
    return "(training)" in row.pattern


def _packed(rows: Sequence[Row]) -> list[Row]:
    """Rows without those of trained weights, which the totals count among the model's tensors."""
    return [row for row in rows if not _trains(row)]


def _prefix(index: int) -> str:
    """Keeps the node names of several graphs apart; none for the first."""
    return f"{index}:" if index else ""


def _as_run(row: Row, compiled: Row | None, model: torch.nn.Module) -> Row:
    """The row of a packed module, with the kernel of its last call and what it was fused with."""
    current = copy.copy(row)
    if compiled is not None and "packed " in compiled.pattern:
        current.pattern = re.sub("packed (linear|embedding)", row.pattern, compiled.pattern)
    for tensor in _packed_buffers(model, [row]):
        current.kernel = dispatch.last_kernel(tensor) or current.kernel
    return current


def _as_held(rows: Iterable[Row], model: torch.nn.Module) -> Iterator[Row]:
    """The rows; those of weights packed before compilation in the terms of the modules that hold
    them. A graph knows of the bytes alone, not of their planes or of what they were made from.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    earlier = {row.name: row for row in getattr(model, "_ternc_rows", ())}
    for row in rows:
        layer = layers.get(row.name)
        if "packed " in row.pattern and isinstance(layer, TernaryLinear):
            held, first = packed_row(row.name, layer), earlier.get(row.name, row)
            row = dataclasses.replace(
                held,
                pattern=row.pattern,
                reason=row.reason,
                weight_error=first.weight_error,
                output_error=first.output_error,
                kernel=row.kernel,
                shared_with=row.shared_with,
            )
        yield row


def _packed_buffers(model: torch.nn.Module, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
    """Packed tensors of the modules that rows of `quantize` name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in rows:
        module = modules.get(row.name)
        if row.action == "rewritten" and isinstance(module, TernaryLinear):
            yield from module.packed_tensors()
