"""Reading and copying a Dynamo graph: example values, names of inputs, which inputs are weights."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_PATH_STEP = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_STATIC = "_dynamo_static_input_type"


def example_value(node: Any) -> Any:
    """Fake tensor (or number) that the node computed while it was traced; None if unknown."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(example_value(node), torch.Tensor)


def source_of(placeholder: fx.Node) -> str:
    """Python expression of a graph input, `L['self']._modules['a']._parameters['weight']`; "" if
    unknown.
    """
    if "ternc_source" in placeholder.meta:
        return placeholder.meta["ternc_source"]
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


def dotted_path(source: str) -> str:
    """`L['self']._modules['a']._parameters['weight']` -> `a.weight`; other expressions
    unchanged.
    """
    steps = [step for step in _PATH_STEP.findall(source) if step != "_orig_mod"]
    return ".".join(steps) or source


def module_path(source: str) -> str:
    """Path of the module that owns a parameter: `a.weight` -> `a`, `a.in_proj_weight` ->
    `a.in_proj`.

    A parametrised weight, `a.parametrizations.weight.original`, belongs to `a`.
    """
    path = dotted_path(source)
    owner, found, _ = path.partition(".parametrizations.")
    if found:
        return owner
    if path.startswith("parametrizations."):
        return ""
    owner, _, leaf = path.rpartition(".")
    stem = leaf.removesuffix("_weight") if leaf.endswith("_weight") else ""
    return ".".join(part for part in (owner, stem) if part) or path


def calling_module(node: fx.Node) -> str:
    """Path of the innermost module whose forward made a node; "" for the root or unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    if "_modules[" in path:
        return dotted_path(path)
    return re.sub(r"^L\['[^']*'\]\.?", "", path)


def mark_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Writes to every placeholder's meta its position and whether it is static (parameter,
    buffer).
    """
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        example = example_inputs[position]
        static = isinstance(example, torch.nn.Parameter) or _STATIC in node.meta.get(
            "tensor_dict", {}
        )
        node.meta["ternc_position"] = position
        node.meta["ternc_static"] = static and isinstance(example, torch.Tensor)


def is_static_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta.get("ternc_static", False)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A shallow copy that may be edited; Dynamo reads the original again after the backend returns.

    Sources of the placeholders are carried over: ahead-of-time autograd asks for them. Dynamo's
    weak references to their tensors are not: a tensor that has any cannot be swapped.
    """
    mapping: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, mapping))
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    for old in gm.graph.find_nodes(op="placeholder"):
        if hasattr(old, "_dynamo_source"):
            mapping[old]._dynamo_source = old._dynamo_source
        mapping[old].meta["ternc_source"] = source_of(old)
        mapping[old].meta.pop("grapharg", None)
    return copied


_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
_INFERENCE = ("_enter_inference_mode", "_exit_inference_mode")


def mode_switches(graph: fx.Graph) -> list[fx.Node]:
    """Calls that switch gradients, autocast or inference mode from there on, in graph order."""
    names = {*_MODES, *_INFERENCE}
    return [node for node in graph.nodes if getattr(node.target, "__name__", "") in names]


def enables_grad(graph: fx.Graph) -> bool:
    """Whether some part of the graph runs with gradients whatever the caller's mode is."""
    return any(
        getattr(node.target, "__name__", "") == "_set_grad_enabled" and node.args[:1] == (True,)
        for node in mode_switches(graph)
    )


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments, for code that has checked what the node is."""
    return node.args


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Argument of a call by position or keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def is_call(node: Any, name: str) -> bool:
    """Whether `node` calls the op of this canonical name, in any spelling."""
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_function", "call_method")
        and node.target in _SPELLINGS[name]
        and _CHANGES_MEANING.isdisjoint(node.kwargs)
    )


_CHANGES_MEANING = frozenset(("alpha", "rounding_mode", "out"))


_SPELLINGS: dict[str, set[Any]] = {
    "add": {operator.add, operator.iadd, torch.add, torch.Tensor.add, "add", "add_"},
    "mul": {
        operator.mul,
        operator.imul,
        torch.mul,
        torch.multiply,
        torch.Tensor.mul,
        "mul",
        "mul_",
    },
    "div": {operator.truediv, torch.div, torch.true_divide, "div", "true_divide"},
    "pow": {operator.pow, torch.pow, torch.Tensor.pow, "pow"},
    "square": {torch.square, "square"},
    "mean": {torch.mean, "mean"},
    "rsqrt": {torch.rsqrt, "rsqrt"},
    "sqrt": {torch.sqrt, "sqrt"},
    "cast": {"to", "float", "half", "bfloat16", "type_as", "type"},
}
