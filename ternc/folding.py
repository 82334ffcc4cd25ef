"""fold(model, example inputs) -> the same function in another basis: rotations folded into weights.

trace -> places where the graph allows a fold (`passes/folds/`) -> parameters written in place

Before quantisation the model computes what it did, but for rounding; what the example call does not
show (a hidden state asked for by another call) may be in the rotated basis.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ternc.backend import as_found
from ternc.calibration.batches import call, evaluating
from ternc.config import Config
from ternc.modules.ties import memory_key
from ternc.passes.folds.fold import Edit, Fold
from ternc.passes.graph import is_static_input
from ternc.passes.pipeline import find_folds
from ternc.reporting import Row
from ternc.runtime import ops
from ternc.runtime.dynamo import without_limits


@dataclasses.dataclass
class Folding:
    """Where the inputs of layers are rotated, by the names of the layers."""

    rotated: dict[str, str] = dataclasses.field(default_factory=dict)
    """Layers whose inputs arrive rotated now, and how."""
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    """Layers whose inputs could not be rotated offline, and why."""
    scaled: dict[str, str] = dataclasses.field(default_factory=dict)
    """Layers whose weight took in a scale of its input, and which."""
    failed: str | None = None
    """Why nothing could be folded anywhere."""

    def describe(self, rows: Sequence[Row]) -> None:
        """Says in the report rows where the input of a layer is rotated, and why there."""
        for row in rows:
            if row.name in self.rotated:
                row.reason += f"; {self.rotated[row.name]}"
            elif row.format.endswith("rotated"):
                why = self.refused.get(row.name) or self.failed
                row.reason += "; input rotated online" + (f": {why}" if why else "")
            if row.name in self.scaled:
                row.reason += f"; {self.scaled[row.name]}"


def fold(model: nn.Module, example_inputs: Any, config: Config) -> Folding:
    """Folds every rotation that the graph of `model(example_inputs)` allows, in place.

    Args:
        example_inputs: as for `ternc.quantize`; the model runs on them once. None: nothing is done.
        config: nothing is done unless it asks for rotation="hadamard".
    """
    if config.rotation != "hadamard":
        return Folding()
    if example_inputs is None:
        return Folding(failed="without example_inputs nothing is rotated offline")
    ops.register()
    seen: list[tuple[list[Fold], Sequence[Any]]] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        copied, context = as_found(gm, inputs, config)
        seen.append((find_folds(copied, context), inputs))
        return gm.forward

    try:
        with evaluating(model), without_limits():
            static: Any = torch.compile(model, backend=record, dynamic=False)
            call(static, example_inputs)
    except Exception as error:
        seen.clear()
        return Folding(failed=f"nothing is rotated offline: tracing failed ({_first_line(error)})")
    found, count = seen[:1], len(seen)
    seen.clear()  # Dynamo keeps `record`, which must not keep the weights alive
    if count != 1:
        why = f"Dynamo made {count} graphs of the model, and one has to show every reader"
        return Folding(failed=f"nothing is rotated offline: {why}")
    return _apply(model, *found[0])


def _apply(model: nn.Module, folds: Sequence[Fold], inputs: Sequence[Any]) -> Folding:
    names: dict[int, list[str]] = defaultdict(list)
    owners: dict[Hashable, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names[id(tensor)].append(path)
                owners[memory_key(tensor)].append(f"{path}.{leaf}" if path else leaf)

    def tensor_of(node: fx.Node) -> torch.Tensor:
        return inputs[node.meta["ternc_position"]]

    folding = Folding()
    edits: list[Edit] = []
    for place in folds:
        held = [owners[memory_key(tensor_of(edit.parameter))] for edit in place.edits]
        tied = next((found for found in held if len(found) != 1), None)
        done = bool(place.edits) and tied is None
        edits += place.edits if done else []
        note = place.note if tied is None else f"not rotated offline: {_tied(tied)}"
        for node in place.readers:
            for name in names[id(tensor_of(node))] if is_static_input(node) else ():
                if done:
                    (folding.rotated if place.rotates else folding.scaled)[name] = note
                elif place.rotates:
                    folding.refused[name] = note
    with torch.no_grad():
        for edit in sorted(edits, key=lambda edit: edit.step):
            tensor = tensor_of(edit.parameter)
            tensor.copy_(edit.change(tensor.detach()))
    return folding


def _tied(names: Sequence[str]) -> str:
    """Why a tensor with so many names cannot be edited."""
    listed = " and ".join(names)
    return f"{listed} are one weight" if names else "a tensor is no parameter and no buffer"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
