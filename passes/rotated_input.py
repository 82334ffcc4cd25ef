"""hadamard(y, signs, block) before a product, read as a rotation of y that a fused op can do."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from ternc.passes.graph import arguments


@dataclasses.dataclass(frozen=True)
class RotatedInput:
    """x = y R, or x = y where `block` is 0."""

    x: fx.Node
    """What the products read."""
    y: fx.Node
    signs: fx.Node | None = None
    block: int = 0

    @property
    def label(self) -> str:
        """For report patterns: what the fused op does between y and the integers."""
        return " + hadamard" if self.block else ""


def is_hadamard(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        torch.ops.ternc.hadamard,
        torch.ops.ternc.hadamard.default,
    )


def read_rotation(x: fx.Node) -> RotatedInput:
    """The rotation that makes x, its signs an input of the graph; else x as it is."""
    if is_hadamard(x):
        y, signs, block = arguments(x)
        if signs is None or signs.op == "placeholder":
            return RotatedInput(x, y, signs, block)
    return RotatedInput(x, x)
