"""Running passes on the graphs that Dynamo makes of small modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ternc.passes.graph import copy_graph, mark_inputs


class Wrapper(nn.Module):
    """Dynamo skips frames of torch.nn: a module of the user's calls the one under test."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def run_with(
    module: nn.Module | Callable[..., Any],
    edit: Callable[[fx.GraphModule, Sequence[Any]], Any],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list[fx.GraphModule]]:
    """Output of the module run through graphs that `edit` changed, and those graphs."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        copied = copy_graph(gm)
        mark_inputs(copied, inputs)
        edit(copied, inputs)
        copied.graph.lint()
        copied.recompile()
        graphs.append(copied)
        return copied.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend)(*args, **kwargs), graphs


def targets(gm: fx.GraphModule) -> list[str]:
    """Names of the called functions and methods, in order."""
    return [
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method")
    ]
