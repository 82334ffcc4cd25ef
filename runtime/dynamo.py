"""What Dynamo tells of its graphs: the model and the options behind a compiled one, and where it
was split; and how often it traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext

_MORE = "TORCH_LOGS=graph_breaks says more"
_MANY = 1 << 30


@dataclasses.dataclass(frozen=True)
class Part:
    """One graph of a model, as a part of what Dynamo traced."""

    frame: int | None
    """Number of the code that was traced: graphs of one code are compilations of one part."""
    broken: str | None
    """Why Dynamo ended the graph before the end of its code, and where; None where it did not."""


def part_of(gm: fx.GraphModule) -> Part:
    """The part that a graph is, as it comes from Dynamo to a backend."""
    identity = CompileContext.current_compile_id()
    ended: Any = getattr(gm, "compile_subgraph_reason", None)
    broken = None
    if ended is not None and ended.graph_break:
        broken = str(ended.reason).strip().split("\n")[0]
        if ended.user_stack:
            at = ended.user_stack[-1]
            broken += f" ({Path(at.filename).name}:{at.lineno} in {at.name})"
    return Part(None if identity is None else identity.frame_id, broken)


def split_notes(parts: Iterable[Part]) -> list[str]:
    """What a report says of a model that is more than one graph."""
    found = list(parts)
    count = len({part.frame for part in found})
    reasons = list(dict.fromkeys(part.broken for part in found if part.broken is not None))
    if not reasons and count < 2:
        return []
    if not reasons:
        return [
            f"the model is {count} graphs, compiled apart or with code that Dynamo left to "
            f"Python in between; {_MORE}"
        ]
    split = f"split the model into {count} graphs" if count > 1 else "left the rest to Python"
    return [f"Dynamo {split}: {'; '.join(reasons)}. {_MORE}"]


def without_limits() -> AbstractContextManager[None]:
    """For graphs that are looked at once: Dynamo traces however often it has traced the same code,
    for other models or other settings. Past its limits it would run the code as it is.
    """
    patched: Any = torch._dynamo.config.patch(
        recompile_limit=_MANY, accumulated_recompile_limit=_MANY
    )
    return patched


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside `torch.compile(model)`; any other model itself."""
    return getattr(model, "_orig_mod", model)


def options_of(model: torch.nn.Module) -> dict[str, Any] | None:
    """The options that `torch.compile` was given for a compiled module; None where Dynamo does not
    tell.
    """
    backend: Any = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    given = getattr(backend, "kwargs", None)
    return dict(given.get("options") or {}) if isinstance(given, dict) else None
