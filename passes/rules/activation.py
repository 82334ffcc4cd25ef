"""linear(act(gate) * up, W) -> linears(activate_quantize(gate, up), W); also without the product,
and with a Hadamard rotation before W.

The activation function is found by its values, whatever its spelling.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from ternc.passes.context import Context
from ternc.passes.graph import arguments, example_value, is_call, is_tensor
from ternc.passes.inline import inline
from ternc.passes.region import ancestors, between, evaluate
from ternc.passes.rotated_input import read_rotation
from ternc.passes.rule import Match, Skip
from ternc.passes.ternary_call import label_rows, read, read_known, retarget, ternary_users

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
}
_LARGE = 2.0 ** torch.arange(4, 15)
"""Up to 16,384: a clipped ReLU is no ReLU."""
_GRID = 257 + 2 * len(_LARGE)
_ROWS = 3
_TOLERANCE = 3e-6


class ActivationRule:
    """Runs after NormRule: what is left before a down projection."""

    name = "linears(act(gate) * up, W) -> linears(activate_quantize(gate, up), W)"

    def match(self, node: fx.Node) -> Match | None:
        call = read(node)
        if call is None or not call.pristine or not is_tensor(call.x):
            return None
        rotated = read_rotation(call.x)
        found = _gated(rotated.y) or _plain(rotated.y) or _product(rotated.y)
        if found is None:
            return None
        gate, up, activation = found
        parts = {"gate": gate, "up": up, "activation": activation, "bits": call.bits}
        return Match(rotated.y, {**parts, "rotated": rotated})

    def check(self, match: Match, context: Context) -> Skip | None:
        if context.grad_enabled:
            return Skip("gradients do not flow through integers: the activation stays separate")
        h, x = match.root, match.parts["rotated"].x
        readers = [u for u in ternary_users(x) if read_known(u).bits == match.parts["bits"]]
        if len(readers) < len(x.users) or (x is not h and len(h.users) > 1):
            return Skip("the activation is read by something else too", h)
        return context.why_not_move(match.parts["gate"], match.parts["up"], h, x)

    def rewrite(self, match: Match, context: Context) -> None:
        h, parts, rotated = match.root, match.parts, match.parts["rotated"]
        outputs = inline(
            h,
            torch.ops.ternc.activate_quantize.default,
            parts["gate"],
            parts["up"],
            parts["activation"],
            rotated.signs,
            rotated.block,
            parts["bits"],
        )
        outputs.meta["ternc_rule"] = self.name
        q, sx = (inline(h, operator.getitem, outputs, i) for i in range(2))
        label = parts["activation"] + (" * up" if parts["up"] is not None else "")
        for reader in ternary_users(rotated.x):
            label_rows(reader, label + rotated.label)
            retarget(reader, q, sx, self.name)


def _gated(h: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """(gate, up, activation) of act(gate) * up."""
    if not is_call(h, "mul") or len(h.args) != 2 or not all(map(is_tensor, h.args)):
        return None
    operands = arguments(h)
    for acted, up in (operands, operands[::-1]):
        if not _alike(acted, up) or not _alike(acted, h):
            continue
        if found := _activation(acted):
            return found[0], up, found[1]
    return None


def _product(h: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """(gate, up, "none") of gate * up, where neither is an activation that is known."""
    if not is_call(h, "mul") or len(h.args) != 2 or not all(map(is_tensor, h.args)):
        return None
    first, second = arguments(h)
    return (first, second, "none") if _alike(first, second) and _alike(first, h) else None


def _plain(h: fx.Node) -> tuple[fx.Node, None, str] | None:
    found = _activation(h)
    return None if found is None else (found[0], None, found[1])


def _activation(acted: fx.Node) -> tuple[fx.Node, str] | None:
    """(input, name) of the activation function that computes `acted` from one tensor."""
    for source in ancestors(acted)[1:]:
        if not is_tensor(source) or not _alike(source, acted):
            continue
        region = between(source, acted)
        if region is None:
            continue
        if name := _name_of(source, acted, region):
            return source, name
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = example_value(a), example_value(b)
    return first.dtype == second.dtype and str(first.shape) == str(second.shape)


def _grid(dtype: torch.dtype) -> torch.Tensor:
    """Values from -9 to 9, and large ones of both signs."""
    return torch.cat([-_LARGE, torch.linspace(-9.0, 9.0, 257), _LARGE]).to(dtype)


def _name_of(source: fx.Node, acted: fx.Node, region: set[fx.Node]) -> str | None:
    """Which function the region computes, on a grid of the source's rank and dtype.

    Every row is another part of the grid, so that code which moves rows is no match.
    """
    value = example_value(source)
    shape = [_ROWS] * (value.dim() - 1) + [_GRID]
    given = _grid(value.dtype).repeat(math.prod(shape[:-1])).view(shape)
    given = given + torch.arange(math.prod(shape[:-1]), dtype=value.dtype).view(*shape[:-1], 1) / 64
    computed = evaluate(source, acted, region, given)
    if computed is None or computed.shape != given.shape:
        return None
    tolerance = max(_TOLERANCE, 2 * torch.finfo(value.dtype).eps)
    for name, function in _FUNCTIONS.items():
        expected = function(given.float()).to(value.dtype).float()
        if torch.allclose(computed.float(), expected, rtol=tolerance, atol=tolerance):
            return name
    return None
