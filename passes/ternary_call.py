"""`TernaryCall`: one view of `ternc::linear` and `ternc::linears1..4` nodes, for the rules that
fuse them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from ternc.passes.graph import arguments, example_value
from ternc.passes.inline import carry_provenance, inline
from ternc.reporting import Row
from ternc.runtime.ops.linears import MAX_WEIGHTS
from ternc.site import WeightSite

FUSED_DEVICES = ("cpu", "cuda")
"""Device types with kernels for `ternc::linears1..4`, `norm_quantize` and `activate_quantize`."""


@dataclasses.dataclass
class TernaryCall:
    """Arguments of `ternc::linears1..4` or `grouped_linear`; `x` holds integers where `sx` is
    there.
    """

    x: fx.Node
    sx: fx.Node | None
    weights: list[fx.Node]
    scales: list[fx.Node]
    multipliers: list[fx.Node | None]
    biases: list[fx.Node | None]
    residual: fx.Node | None
    out_features: list[int]
    group_sizes: list[int]
    bits: int
    layouts: list[int]
    dtype: torch.dtype
    sites: list[WeightSite | None]
    experts: int = 0
    """Number of experts where the one weight is a stack of them, as `ternc::grouped_linear` has."""
    offsets: fx.Node | None = None
    """Ends of the experts' rows; None = as many rows each."""
    rows: list[Row | None] = dataclasses.field(default_factory=list)
    """Report rows of the weights; those of the sites unless others are given."""

    def __post_init__(self) -> None:
        self.rows = self.rows or [None if site is None else site.row for site in self.sites]

    @property
    def fusable(self) -> bool:
        """The device has kernels for the fused ops; elsewhere products stay separate."""
        return example_value(self.weights[0]).device.type in FUSED_DEVICES

    @property
    def pristine(self) -> bool:
        """Its input is floating point and will be quantised: what a fusion can take over."""
        return self.fusable and self.sx is None and self.bits > 0


def is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        torch.ops.ternc.linear,
        torch.ops.ternc.linear.default,
    )


def is_linears(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _overloads()


def is_quantizer(node: Any) -> bool:
    """Whether a node quantises activations and does nothing else."""
    return isinstance(node, fx.Node) and node.target is torch.ops.ternc.quantize_act.default


def read(node: fx.Node) -> TernaryCall | None:
    """The call that `node` is, or None."""
    if is_linear(node):
        x, weight, scale, multiplier, bias, rows, group, bits, layout = arguments(node)
        assert isinstance(x, fx.Node)
        return TernaryCall(
            x=x,
            sx=None,
            weights=[weight],
            scales=[scale],
            multipliers=[multiplier],
            biases=[bias],
            residual=None,
            out_features=[rows],
            group_sizes=[group],
            bits=bits,
            layouts=[layout],
            dtype=example_value(x).dtype,
            sites=[node.meta.get("ternc_site")],
            rows=[node.meta["ternc_row"]] if "ternc_row" in node.meta else [],
        )
    if isinstance(node, fx.Node) and node.target is torch.ops.ternc.grouped_linear.default:
        return _read_grouped(node)
    return _current(node) if is_linears(node) else None


def _current(node: fx.Node) -> TernaryCall:
    """The call of `ternc::linears1..4` with its inputs as they are: a rule may have replaced them
    since it was written.
    """
    call: TernaryCall = node.meta["ternc_call"]
    given = arguments(node)
    residual = given[6] if len(call.weights) == 1 else None
    return dataclasses.replace(call, x=given[0], sx=given[1], residual=residual)


def _read_grouped(node: fx.Node) -> TernaryCall:
    x, sx, offsets, weight, scale, multiplier, experts, rows, group, bits, layout, dtype = (
        arguments(node)
    )
    return TernaryCall(
        x=x,
        sx=sx,
        weights=[weight],
        scales=[scale],
        multipliers=[multiplier],
        biases=[None],
        residual=None,
        out_features=[rows],
        group_sizes=[group],
        bits=bits,
        layouts=[layout],
        dtype=dtype,
        sites=[node.meta["ternc_stack"]],
        experts=experts,
        offsets=offsets,
    )


def write(call: TernaryCall, before: fx.Node, like: fx.Node, rule: str) -> list[fx.Node]:
    """Emits one of `ternc::linears1..4`, or `grouped_linear`, before a node; returns its outputs,
    one per weight.
    """
    if call.experts:
        return [_write_grouped(call, before, like, rule)]
    target = _overloads()[len(call.weights) - 1]

    def emit(*args: Any) -> Any:
        return target(*args)

    arguments_of = _single if len(call.weights) == 1 else several
    node = inline(before, emit, *arguments_of(call, before.graph))
    node.meta["ternc_call"] = call
    node.meta["ternc_rule"] = rule
    carry_provenance(like, node)
    if len(call.weights) == 1:
        return [node]
    return [inline(before, lambda all_, i=i: all_[i], node) for i in range(len(call.weights))]


def _write_grouped(call: TernaryCall, before: fx.Node, like: fx.Node, rule: str) -> fx.Node:
    node = inline(
        before,
        torch.ops.ternc.grouped_linear.default,
        call.x,
        call.sx,
        call.offsets,
        call.weights[0],
        call.scales[0],
        call.multipliers[0],
        call.experts,
        call.out_features[0],
        call.group_sizes[0],
        call.bits,
        call.layouts[0],
        call.dtype,
    )
    node.meta["ternc_stack"] = call.sites[0]
    node.meta["ternc_rule"] = rule
    carry_provenance(like, node)
    return node


def _overloads() -> list[Any]:
    """The op of one weight, of two, and so on."""
    ops = torch.ops.ternc
    return [getattr(ops, f"linears{count}").default for count in range(1, MAX_WEIGHTS + 1)]


def _single(call: TernaryCall, graph: fx.Graph) -> tuple[Any, ...]:
    return (
        call.x,
        call.sx,
        call.weights[0],
        call.scales[0],
        call.multipliers[0],
        call.biases[0],
        call.residual,
        call.out_features[0],
        call.group_sizes[0],
        call.bits,
        call.layouts[0],
        call.dtype,
    )


def several(call: TernaryCall, graph: fx.Graph) -> tuple[Any, ...]:
    return (
        call.x,
        call.sx,
        call.weights,
        call.scales,
        [m if m is not None else _none(graph, call.weights[0]) for m in call.multipliers],
        [b if b is not None else _none(graph, call.weights[0]) for b in call.biases],
        call.out_features,
        call.group_sizes,
        call.bits,
        call.layouts,
        call.dtype,
    )


def _none(graph: fx.Graph, like: fx.Node) -> fx.Node:
    """The empty tensor that stands for no bias and no multiplier; one a graph and device."""
    device = example_value(like).device
    for node in graph.nodes:
        if node.meta.get("ternc_none") == device:
            return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    node = inline(first, lambda weight: weight.new_empty(0), like)
    node.meta["ternc_none"] = device
    return node


def read_known(node: fx.Node) -> TernaryCall:
    """The call that `node` is known to be."""
    call = read(node)
    assert call is not None
    return call


def ternary_users(x: fx.Node) -> list[fx.Node]:
    """Users of x that take it in floating point, as their input and nothing else."""
    found = []
    for user in x.users:
        call = read(user)
        if call is None or call.sx is not None or call.x is not x:
            continue
        if not any(x is other for other in (*call.biases, call.residual)):
            found.append(user)
    return found


def label_rows(node: fx.Node, label: str) -> None:
    """Names, in the report rows of a product, what its fused input does before it."""
    for row in read_known(node).rows:
        if row is not None:
            row.pattern = f"{label} + {row.pattern}"


def retarget(node: fx.Node, q: fx.Node, sx: fx.Node, rule: str) -> None:
    """Makes a linear(s) node read integers instead of floating point, in place of `node`."""
    call = read(node)
    assert call is not None
    outputs = write(dataclasses.replace(call, x=q, sx=sx), node, node, rule)
    replace_outputs(node, outputs)


def replace_outputs(node: fx.Node, outputs: list[fx.Node]) -> None:
    """Uses of a node, or of the items of one with several outputs -> `outputs`; erases it."""
    if len(outputs) == 1:
        node.replace_all_uses_with(outputs[0])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(outputs[arguments(user)[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
