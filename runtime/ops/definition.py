"""`OpDefinition`: one operator as data: schema, reference, fake, backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ternc.errors import DifferentiationError

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of activations, outputs and biases."""


@dataclasses.dataclass(frozen=True)
class OpDefinition:
    """An operator `ternc::name`, defined by its reference."""

    name: str
    schema: str
    """Arguments and results as in docs/architecture.md, without the name."""
    reference: Callable[..., Any]
    """Eager, any device: the definition that every kernel must agree with."""
    fake: Callable[..., Any]
    """Shapes and dtypes of the results; reads no data."""
    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    autocast: Callable[..., Any] | None = None
    """Makes an implementation of the op under autocast from a device type."""


def refuse_gradient(op: str, remedy: str) -> Callable[..., None]:
    """A setup_context that raises DifferentiationError: no gradient is ever dropped silently."""

    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        raise DifferentiationError(
            f"ternc::{op} has no gradient, and one of its inputs requires grad; {remedy}, "
            "or call it under torch.no_grad()"
        )

    return refuse


def unreachable_backward(ctx: Any, *grads: torch.Tensor) -> None:
    """Backward of an op whose setup_context raises."""
    raise AssertionError("setup_context raises before a graph is recorded")
