"""Packed module with its state -> a step that is compiled ahead of time.

    module(*inputs) --Dynamo, passes--> graph --AOTInductor--> .pt2 file of machine code
    file, module --bind--> Step: step(*inputs) is module(*inputs), without Dynamo's frame and guards

What the module holds (weights, a cache of keys) is handed to the code where it lies: nothing is
stored twice, and what the module writes in place is written there.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ternc.backend import rewrite
from ternc.config import Config
from ternc.errors import DifferentiationError, InputError, UnsupportedModelError
from ternc.modules.linear import TernaryLinear
from ternc.passes.graph import source_of
from ternc.runtime import ops
from ternc.runtime.dynamo import uncompiled, without_limits
from ternc.runtime.inductor import Program, compile_package, load_package

_ROOT = r"L\['\w+'\]"
"""Dynamo's name for the module: `self`, as its forward calls it; `fn` where its class is one of
torch.nn.
"""
_SIDE_EFFECTS = "certain side effects"
"""Of Dynamo's warning."""
_MEMBER = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_ATTRIBUTE = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]|\['([^']*)'\]")


class Step:
    """A compiled `module(*inputs)`: the same inputs in, the same tensors out, no gradients.

    It holds the module's tensors as they were when it was bound: what is written into them is
    seen, a Parameter or buffer put in the place of another is not, until `bind`.
    """

    def __init__(self, program: Program, facts: dict[str, Any], module: nn.Module) -> None:
        self._program = program
        self._facts = facts
        self._inputs = [(i["position"], _Shape(i)) for i in facts["inputs"]]
        self.bind(module)

    def bind(self, module: nn.Module) -> None:
        """Takes the tensors of `module` from now on: of another instance, or after a replacement.

        Raises:
            InputError: a tensor that the code reads is missing or of another shape, dtype or
            stride, a packed layer has another format, or tensors that were one (tied) are not.
        """
        module = uncompiled(module)
        layers = _layers(module)
        for name, layer in self._facts["layers"].items():
            if layers.get(name) != layer:
                raise InputError(f"{name} is {layers.get(name)}; the step was compiled for {layer}")
        places: list[Any] = [None] * self._facts["places"]
        for held in self._facts["held"]:
            found = [_tensor_at(module, path) for path in held["paths"]]
            if any(tensor is not found[0] for tensor in found):
                raise InputError(f"{' and '.join(held['paths'])} were one tensor, and are not here")
            _Shape(held).check(held["paths"][0], found[0])
            places[held["position"]] = found[0]
        self._places = places

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """What the module returns.

        Raises:
            InputError: not the shapes and dtypes that the step was compiled for, or not contiguous.
            DifferentiationError: an input requires gradients, and they are enabled.
        """
        if len(inputs) != len(self._inputs):
            raise InputError(f"the step takes {len(self._inputs)} tensors, not {len(inputs)}")
        arguments = self._places.copy()
        for index, (tensor, (position, shape)) in enumerate(zip(inputs, self._inputs, strict=True)):
            shape.check(f"input {index}", tensor)
            if tensor.requires_grad and torch.is_grad_enabled():
                raise DifferentiationError(
                    f"input {index} requires gradients, and a step has none: call the module, or "
                    "the step under torch.no_grad()"
                )
            if position is not None:
                arguments[position] = tensor
        outputs = self._program(arguments)
        returned = self._facts["returned"]
        if isinstance(returned, int):
            return outputs[returned]
        return tuple(outputs[index] for index in returned)


def compile_step(
    module: nn.Module, inputs: Sequence[torch.Tensor], path: str | os.PathLike[str]
) -> Step:
    """Compiles `module(*inputs)` on the CPU for these shapes, once, and writes it to `path`.

    The module is traced, not run: its state stays as it is. The file has machine code and names
    of tensors, no weights.

    Args:
        module: with packed layers; all tensors it reads are its own (also in lists, dicts and
            objects that it holds), its state is changed in place only, and it returns a tensor or
            a tuple of them.
        inputs: contiguous examples, each another tensor, none of them the module's own.
        path: a file that ends in .pt2, in a folder that is there.

    Raises:
        InputError: no packed layer, or inputs or a path as above are not given.
        UnsupportedModelError: the module cannot be traced as one graph, or does what is not above.
        KernelError: AOTInductor cannot compile the graph, without a C++ compiler for example.
    """
    module, path = uncompiled(module), Path(path)
    _check(module, inputs, path)
    ops.register()
    graph, held, facts = _traced(module, list(inputs))
    compile_package(graph, held, path, facts)
    return load_step(path, module)


def load_step(path: str | os.PathLike[str], module: nn.Module) -> Step:
    """The step that `compile_step` wrote to `path`, with the tensors of `module`.

    The file is machine code, which runs with all your rights: load your own.

    Raises:
        KernelError: no such file, a damaged one, or one for another machine, torch or version of
        ternc.
        InputError: `module` has not the tensors that the step reads.
    """
    ops.register()
    return Step(*load_package(Path(path)), module)


class _Shape:
    """What a tensor has to be for code compiled for it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.size = torch.Size(facts["size"])
        self.stride = tuple(facts["stride"])
        self.dtype = getattr(torch, facts["dtype"])

    def check(self, name: str, tensor: Any) -> None:
        """Raises InputError where `tensor` is something else."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu:
            raise InputError(f"{name} is no tensor on the CPU, which the step was compiled for")
        seen = (tensor.shape, _strides(tensor), tensor.dtype)
        if seen != (self.size, self.stride, self.dtype):
            raise InputError(
                f"{name} is {_text(*seen)}; the step was compiled for "
                f"{_text(self.size, self.stride, self.dtype)}"
            )


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides; 1 where a dimension has one place and its stride means nothing."""
    strides = tensor.stride()
    if 1 not in tensor.shape:
        return strides
    return tuple(1 if n == 1 else s for n, s in zip(tensor.shape, strides, strict=True))


def _text(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> str:
    return f"{dtype} {list(size)} with strides {list(stride)}"


def _facts_of(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"size": list(tensor.shape), "stride": list(_strides(tensor)), "dtype": dtype}


def _check(module: nn.Module, inputs: Sequence[Any], path: Path) -> None:
    if not any(isinstance(layer, TernaryLinear) for layer in module.modules()):
        raise InputError(
            f"{type(module).__name__} has no packed layer; pack it with ternc.quantize first"
        )
    if not isinstance(inputs, list | tuple):
        raise InputError(f"inputs is a {type(inputs).__name__}, not a sequence; give (x,)")
    own = set(map(id, (*module.parameters(), *module.buffers())))
    for index, value in enumerate(inputs):
        if id(value) in own:
            raise InputError(f"input {index} is a tensor of the module; give an example, a clone")
        if not isinstance(value, torch.Tensor) or not value.is_contiguous():
            raise InputError(f"input {index} is no contiguous tensor")
    if len({id(value) for value in inputs}) < len(inputs):
        raise InputError("one tensor is given as two inputs: the step would take them for one")
    if path.suffix != ".pt2":
        raise InputError(f"{path} does not end in .pt2")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder to write {path.name} to; make it first")
    tensors = [*inputs, *module.parameters(), *module.buffers()]
    if not all(tensor.is_cpu for tensor in tensors):
        raise UnsupportedModelError(
            "a step is compiled for the CPU; on a GPU torch.compile(model, backend='ternc', "
            "mode='reduce-overhead') replays one graph"
        )


def _traced(
    module: nn.Module, inputs: list[torch.Tensor]
) -> tuple[fx.GraphModule, list[torch.Tensor], dict[str, Any]]:
    """The rewritten graph of `module(*inputs)`, its inputs, and what a `Step` has to know."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []
    outputs: list[torch.Tensor] = []

    def record(gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        rewritten, _ = rewrite(gm, given, Config(exclude=("*",)))  # what is packed is recognised
        graphs.append((rewritten, list(given)))
        outputs.extend(_like(gm))
        return lambda *_: tuple(outputs)

    traced: Any = torch.compile(module, backend=record, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad(), without_limits(), _no_writes_to_attributes(module):
            returned = traced(*inputs)
    except UnsupportedModelError:
        raise
    except Exception as error:  # of many kinds: whatever the module's code does
        raise UnsupportedModelError(
            f"{type(module).__name__}: its step cannot be traced: {error}"
        ) from error
    if not graphs:
        raise UnsupportedModelError(
            f"{type(module).__name__} computes nothing from these inputs, or Dynamo has given up "
            "its code earlier in this process: torch._dynamo.reset() lets it try again"
        )
    gm, given = graphs.pop()  # Dynamo keeps `record`, which is to keep no tensor of the module
    places, facts = _places(module, gm, given, inputs)
    return gm, places, facts | {"returned": _returned(module, returned, outputs)}


@contextlib.contextmanager
def _no_writes_to_attributes(module: nn.Module) -> Iterator[None]:
    """Raises where Dynamo finds that the module sets an attribute or grows a list: it leaves such
    writes to Python, and a step has none. Tensors that are written in place are in the graph.
    Writes to globals are let pass: language models of transformers make some.
    """
    policy: Any = torch._dynamo.config.patch(side_effect_replay_policy="warn")
    with warnings.catch_warnings(record=True) as caught, policy:
        warnings.simplefilter("always")  # also where the user's filters hide it
        yield
    for warning in caught:
        if _SIDE_EFFECTS not in str(warning.message):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif written := re.findall(_ROOT + r'[^"]*', str(warning.message)):
            names = ", ".join(_path(source) or "the module" for source in written)
            raise UnsupportedModelError(
                f"{type(module).__name__}: its step changes {names} in Python; what changes has "
                "to be tensors, written in place"
            )


def _like(gm: fx.GraphModule) -> list[torch.Tensor]:
    """A tensor without values for every output of a Dynamo graph."""
    (nodes,) = next(iter(gm.graph.find_nodes(op="output"))).args
    fakes = [node.meta["example_value"] for node in nodes]
    return [torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype) for fake in fakes]


def _returned(module: nn.Module, returned: Any, outputs: list[torch.Tensor]) -> int | list[int]:
    """Which outputs of the graph the module returns: one, or a tuple of them."""
    order = {id(tensor): index for index, tensor in enumerate(outputs)}
    several = isinstance(returned, tuple | list)
    found = [order.get(id(value)) for value in (returned if several else [returned])]
    indices = [index for index in found if index is not None]
    if len(indices) < len(found):
        raise UnsupportedModelError(
            f"{type(module).__name__} returns {type(returned).__name__}; a step returns a tensor "
            "that it computes, or a tuple of such"
        )
    return indices if several else indices[0]


def _places(
    module: nn.Module, gm: fx.GraphModule, given: list[Any], inputs: list[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Inputs of the graph in order, and where they come from: `inputs`, or paths in `module`."""
    position_of: dict[int, int] = {}
    held: list[dict[str, Any]] = []
    values: list[torch.Tensor] = []
    names = _names(module)
    index_of = {id(tensor): index for index, tensor in enumerate(inputs)}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = given[node.meta["ternc_position"]]
        if not node.users:
            gm.graph.erase_node(node)
            continue
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModelError(f"{source_of(node)} is no tensor, and is no constant")
        if id(value) in index_of:
            position_of[index_of[id(value)]] = len(values)
        else:
            path = _path(source_of(node))
            if _tensor_at(module, path) is not value:
                raise UnsupportedModelError(f"{path} is not found again; hold it in an attribute")
            paths = list(dict.fromkeys([path, *names.get(id(value), [])]))
            held.append({"position": len(values), "paths": paths, **_facts_of(value)})
        values.append(value)
    gm.recompile()
    taken = [{"position": position_of.get(i), **_facts_of(v)} for i, v in enumerate(inputs)]
    facts = {"inputs": taken, "held": held, "places": len(values), "layers": _layers(module)}
    return values, facts


def _layers(module: nn.Module) -> dict[str, str]:
    """What a graph has as constants of every packed layer."""
    return {
        name: f"{layer.extra_repr()}, layout {layer.layout}, {layer.rotation or 'not rotated'}"
        + ("" if layer.multiplies else f", rows of {layer.weight_dtype}")
        for name, layer in module.named_modules()
        if isinstance(layer, TernaryLinear)
    }


def _names(module: nn.Module) -> dict[int, list[str]]:
    """Every name of every Parameter and buffer."""
    found: dict[int, list[str]] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        found.setdefault(id(tensor), []).append(name)
    return found


def _path(source: str) -> str:
    """`L['self']._modules['a'].cache[0].keys` -> `a.cache[0].keys`."""
    if not re.match(_ROOT, source):
        raise UnsupportedModelError(
            f"{source or 'a tensor'} is no attribute of the module; let the module hold it"
        )
    return _MEMBER.sub(r".\1", re.sub(_ROOT, "", source)).removeprefix(".")


def _tensor_at(module: nn.Module, path: str) -> Any:
    """What lies at a path that `_path` made; None where nothing does."""
    found: Any = module
    for attribute, index, key in _ATTRIBUTE.findall(path):
        try:
            found = getattr(found, attribute) if attribute else found[int(index) if index else key]
        except (AttributeError, LookupError, TypeError):
            return None
    return found
