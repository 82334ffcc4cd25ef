"""Which tensors of a graph are written in place: no rule may move a read of them past the write.

x += y, relu_(x), silu(x, inplace=True) -> the call that writes to no tensor, read from there on,
where x is fresh and has no views; what is left taints x and everything that shares its storage.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.passes.graph import argument, arguments, example_value, is_tensor
from ternc.passes.inline import evaluate_example

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_POINTWISE = frozenset(
    (
        *("relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "elu", "leaky_relu", "hardtanh"),
        *("hardswish", "hardsigmoid", "mish", "selu", "celu", "softplus", "threshold", "dropout"),
        *("add", "sub", "mul", "div", "pow", "neg", "exp", "square", "sqrt", "rsqrt", "abs"),
        *("clamp", "clamp_min", "clamp_max", "masked_fill"),
    )
)
"""Calls whose form with a trailing underscore, or `inplace`, differs in where it writes alone."""

_VIEW_NAMES = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "view_as", "transpose", "permute", "swapaxes"),
        *("t", "expand", "squeeze", "unsqueeze", "narrow", "select", "getitem", "getattr"),
        *("ravel", "movedim", "moveaxis", "swapdims", "expand_as", "reshape_as", "broadcast_to"),
        *("diagonal", "unfold", "as_strided", "adjoint", "real", "imag", "conj", "resolve_conj"),
        *("view_as_real", "view_as_complex", "broadcast_tensors", "atleast_2d", "atleast_3d"),
        *("chunk", "split", "unbind", "contiguous", "detach", "tensor_split", "split_with_sizes"),
        *("unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit"),
        *("to", "float", "half", "bfloat16", "double", "type", "type_as", "cpu", "cuda"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "_get_data_attr"),
    )
)
"""Calls whose result may share storage with their first argument."""


def name_of(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "uniform_")


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    return any(word in name_of(node) for word in _RANDOM)


_KEYWORDS = frozenset((operator.and_, operator.or_, operator.not_, operator.is_))
"""Functions whose names end in an underscore because Python has the word itself."""


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call writes to its first argument, or to what is given as `out`."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    return (
        (name.endswith("_") and not name.endswith("__") and node.target not in _KEYWORDS)
        or node.target in _OUT_OF_PLACE
        or node.target is operator.setitem
        or _inplace_argument(node) is True
        or isinstance(node.kwargs.get("out"), fx.Node)
    )


def written_by(node: fx.Node) -> object:
    """What a call that writes in place writes to."""
    return node.kwargs.get("out") or (node.args[0] if node.args else None)


@functools.cache
def _inplace_index(function: Any) -> int | None:
    """Position of the parameter `inplace` of a function; None where it has none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _inplace_argument(node: fx.Node) -> Any:
    index = _inplace_index(node.target) if callable(node.target) else None
    return node.kwargs.get("inplace") if index is None else argument(node, index, "inplace")


def without_needless_writes(gm: fx.GraphModule) -> None:
    """x += y -> z = x + y, and z for x from there on, where x is a fresh tensor without views."""
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        written: Any = written_by(node) if writes_in_place(node) else None
        if written is None or written is not node.args[0] or not is_tensor(written):
            continue
        if shares_storage(written) or _viewed(written) or not _write_nowhere(node):
            continue
        written.replace_all_uses_with(
            node, delete_user_cb=lambda user, at=position[node]: position[user] > at
        )


def _write_nowhere(node: fx.Node) -> bool:
    """Makes a call return what it wrote; False where no call does, or it has another dtype."""
    target, args, kwargs = node.target, node.args, node.kwargs
    if target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
    elif name_of(node).removesuffix("_") not in _POINTWISE:
        return False
    elif _inplace_argument(node) is True:
        index = _inplace_index(target)
        node.args = args if index is None else args[:index]
        node.kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    elif (plain := _without_underscore(node)) is not None:
        node.target = plain
    else:
        return False
    before, after = example_value(arguments(node)[0]), evaluate_example(node)
    if (before.dtype, str(before.shape)) == (after.dtype, str(after.shape)):
        node.meta["example_value"] = after
        return True
    node.target, node.args, node.kwargs = target, args, kwargs
    return False


def _without_underscore(node: fx.Node) -> Any:
    """`relu` for `relu_`: the method, or the function of torch."""
    name = name_of(node).removesuffix("_")
    if node.op == "call_method":
        return name if name != node.target and hasattr(torch.Tensor, name) else None
    return getattr(F, name, None) or getattr(torch, name, None)


def tainted(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose storage is written in place by some call of the graph."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        written = written_by(node) if writes_in_place(node) else None
        if isinstance(written, fx.Node):
            _taint(_base(written), found)
            _taint(node, found)
    return found


def written_between(source: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether a call between two nodes may write to the storage of `source`."""
    base, node = _base(source), first
    while node is not last:
        written = written_by(node) if writes_in_place(node) else None
        if isinstance(written, fx.Node) and _base(written) is base:
            return True
        node = node.next
    return False


def _base(node: fx.Node) -> fx.Node:
    while shares_storage(node) and node.op != "placeholder" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _taint(node: fx.Node, found: set[fx.Node]) -> None:
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        pending.extend(
            user
            for user in current.users
            if shares_storage(user) or (writes_in_place(user) and written_by(user) is current)
        )


def shares_storage(node: fx.Node) -> bool:
    """Whether a call may return a view of its first argument."""
    return node.op == "placeholder" or (
        node.op in ("call_function", "call_method") and name_of(node) in _VIEW_NAMES
    )


def _viewed(node: fx.Node) -> bool:
    return any(shares_storage(user) for user in node.users)


def drop_unused(gm: fx.GraphModule) -> None:
    """Removes what computed the float weights; inputs stay until lowering decides which to pass."""
    for node in reversed(list(gm.graph.nodes)):
        dead = node.op in ("call_function", "call_method", "get_attr") and not node.users
        if dead and not node.is_impure() and not _mutates(node):
            gm.graph.erase_node(node)


def _mutates(node: fx.Node) -> bool:
    """In-place writes to anything but a value that nothing else reads."""
    if not writes_in_place(node):
        return False
    target = written_by(node)
    return not isinstance(target, fx.Node) or (
        shares_storage(target) or any(user is not node for user in target.users)
    )
