"""The backend of `torch.compile(model, backend="ternc")`.

graph -> copy -> normal forms and rules (passes) -> packed inputs (runtime) -> Inductor.
docs/architecture.md has the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from ternc.config import Config, field_names
from ternc.errors import ConfigError, UnknownOptionError
from ternc.passes import pipeline
from ternc.passes.context import Context
from ternc.passes.graph import copy_graph, enables_grad, mark_inputs
from ternc.passes.opaque import is_transformed, report_bodies, report_transformed
from ternc.policy import refuse_live
from ternc.runtime import ops
from ternc.runtime.dynamo import part_of
from ternc.runtime.inductor import INNER_COMPILERS, inner_compiler
from ternc.runtime.lower import CompiledGraph

_EXTRA_OPTIONS = ("inductor", "inner")


def ternc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one Dynamo graph: weights become packed ternary inputs, the rest is Inductor's.

    Args:
        mode: one of Inductor's modes ("reduce-overhead", "max-autotune", ...). "max-autotune" also
            calls ops from C++ on the CPU (Inductor's `cpp_wrapper`): longer to compile.
        options: fields of `ternc.Config`, plus `inductor` (dict of Inductor's settings) and `inner`
            ("inductor", "aot_eager" or "eager": what compiles the rewritten graph).

    Raises:
        UnknownOptionError: an option that is none of these.
        ConfigError: a value that is not allowed, or a setting that only `ternc.quantize` has.
    """
    config, inner, settings = parse_options(options)
    compile_inner = inner_compiler(inner, mode, settings)
    part = part_of(gm)
    ops.register()
    gm, context = rewrite(gm, example_inputs, config)
    compiled = CompiledGraph(
        gm,
        context.sites,
        context.rows,
        context.row_positions,
        context.trained,
        list(example_inputs),
        compile_inner,
        context.abstract,
        context.grad_enabled,
        context.nodes_before,
    )
    compiled.part = part
    compiled.notes.extend(context.notes)
    compiled.options.update(options or {})
    return compiled


def parse_options(options: Mapping[str, Any] | None) -> tuple[Config, str, dict[str, Any]]:
    """Backend options -> (Config, inner compiler, Inductor's settings)."""
    values = dict(options or {})
    known = [*field_names(), *_EXTRA_OPTIONS]
    if unknown := [key for key in values if key not in known]:
        raise UnknownOptionError(unknown, known)
    settings = values.pop("inductor", None) or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"inductor={settings!r} is not a dict of Inductor's settings")
    inner = values.pop("inner", "inductor")
    if inner not in INNER_COMPILERS:
        raise ConfigError(f"inner={inner!r} is not one of {', '.join(INNER_COMPILERS)}")
    config = Config(**values)
    refuse_live(config)
    return config, inner, dict(settings)


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config
) -> tuple[fx.GraphModule, Context]:
    """A rewritten copy of a Dynamo graph, and what was found in it."""
    copied, context = as_found(gm, example_inputs, config)
    if is_transformed(copied.graph):
        mark_inputs(copied, context.inputs)
        report_transformed(copied, context)
        return copied, context
    rewritten = pipeline.run(copied, context)
    report_bodies(rewritten, context)
    return rewritten, context


def as_found(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config
) -> tuple[fx.GraphModule, Context]:
    """A copy of a Dynamo graph that passes may edit, and the context for them."""
    context = Context(
        config=config,
        inputs=list(example_inputs),
        grad_enabled=torch.is_grad_enabled() or enables_grad(gm.graph),
        abstract=any(isinstance(value, FakeTensor) for value in example_inputs),
    )
    return copy_graph(gm), context
