"""Everything that touches Inductor's half-private interfaces, and Dynamo's where it needs them."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

from ternc.errors import ConfigError, KernelError, UnknownOptionError
from ternc.runtime import cpu, entries
from ternc.runtime.ops import fake_quantize

COMPOSED_DEVICES = {"cuda"}
"""Where Inductor takes ternc::fake_quantize_act apart: a norm in front then writes quantised values
at once. The CPU's kernel is one pass already.
"""

PATIENT_MODES = ("max-autotune", "max-autotune-no-cudagraphs")
"""Their user gives time at compilation for time at every call: inference graphs on the CPU then
call their ops from C++, which takes 4 to 50 s more to compile. No graph is compiled again later.
"""

Inner = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

INNER_COMPILERS = ("inductor", "aot_eager", "eager")


def inner_compiler(name: str, mode: str | None, settings: dict[str, Any]) -> Inner:
    """What compiles the rewritten graph.

    Raises:
        ConfigError: `mode` is none of Inductor's, or settings are given to another compiler than
        Inductor. UnknownOptionError: a setting that Inductor does not have.
    """
    if name != "inductor":
        if settings or mode:
            raise ConfigError(f"inner={name!r} takes no mode and no Inductor settings")
        return _compile_eager if name == "eager" else _compile_aot_eager
    of_mode, of_user = _mode_patches(mode), _checked(settings)

    def compile_inductor(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        if _keeps_static_addresses(inputs):
            _mark_packed(gm)
        else:
            _forget_dynamo(gm)
        of_device = _cpu_settings(mode) if _on_cpu(inputs) else {}
        used = {**of_mode, **of_device, **of_user}
        own = _decompositions(inputs) if torch.is_grad_enabled() else None
        compiled: Any = compile_fx(gm, inputs, config_patches=used, decompositions=own)
        return compiled

    return compile_inductor


_FACTS = "ternc"


def compile_package(
    gm: fx.GraphModule, inputs: Sequence[torch.Tensor], path: Path, facts: dict[str, Any]
) -> None:
    """A rewritten graph on the CPU -> a .pt2 file of AOTInductor: machine code and `facts`.

    Every tensor is an input of the program, weights too: none is in the file, which is there whole
    or not at all.

    Raises:
        KernelError: AOTInductor does not compile the graph.
    """
    _forget_dynamo(gm)
    told = {**facts, "torch": torch.__version__, "library": cpu.library_name()}
    # Threads as they are now: cpp.dynamic_threads puts small loops into OpenMP regions too, and in
    # one an index out of range ends the process.
    settings = {
        **_cpu_settings(None),
        "aot_inductor.metadata": {_FACTS: json.dumps(told)},
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of what torch itself pickles
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            staged = Path(folder) / path.name
            try:
                exported = torch.export.export(gm, tuple(inputs), strict=False)
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(staged), inductor_configs=settings
                )
            except Exception as error:  # of many kinds: torch's, the C++ compiler's
                raise KernelError(f"{path}: AOTInductor cannot compile it: {error}") from error
            os.replace(staged, path)


Program = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def load_package(path: Path) -> tuple[Program, dict[str, Any]]:
    """What `compile_package` wrote -> inputs -> outputs, and its facts.

    Raises:
        KernelError: no such file, a damaged one, or one for another machine, torch or library of
        kernels.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        metadata = loader.load_metadata_from_package(str(path), "model")
        facts = json.loads(metadata[_FACTS])
        here = {
            "torch": (facts["torch"], torch.__version__),
            "kernels": (facts["library"], cpu.library_name()),
            "instruction sets": (metadata.get("AOTI_CPU_ISA"), str(pick_vec_isa()).upper()),
        }
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise KernelError(f"{path} is no step that ternc has compiled: {error}") from error
    for what, (seen, wanted) in here.items():
        if seen != wanted:
            raise KernelError(
                f"{path} was compiled for other {what} ({seen}, here {wanted}); compile it anew"
            )
    try:
        return torch._inductor.aoti_load_package(str(path)).loader.boxed_run, facts
    except RuntimeError as error:
        raise KernelError(
            f"{path} cannot be loaded; compile it anew, by a compiler ($CXX) that does not link "
            f"its own C++ library into it, since torch has another: {error}"
        ) from error


def _on_cpu(inputs: list[Any]) -> bool:
    return all(value.is_cpu for value in inputs if isinstance(value, torch.Tensor))


def _cpu_settings(mode: str | None) -> dict[str, Any]:
    """Settings for a graph on the CPU, where calls of ops are counted in microseconds.

    Dynamo guards the shapes of all inputs, and tests hold ops to the shapes they promise: asserting
    both at every call takes 0.3 us a tensor, of which a decoder has 30 a layer. Modes ask for CUDA
    graphs: Inductor would warn that it makes none.
    """
    found: dict[str, Any] = {
        "size_asserts": False,
        "alignment_asserts": False,
        "triton.cudagraphs": False,
    }
    if mode in PATIENT_MODES and not torch.is_grad_enabled():
        found["cpp_wrapper"] = True
    return found | entries.inductor_settings()


def _decompositions(inputs: list[Any]) -> dict[Any, Callable[..., Any]] | None:
    """Inductor's, and that of the op it does better in training, where no bit depends on it."""
    from torch._inductor.decomposition import select_decomp_table

    devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    if not devices & COMPOSED_DEVICES:
        return None
    op = torch.ops.ternc.fake_quantize_act.default
    return {**select_decomp_table(), op: fake_quantize.activation_composite}


def keep_static(tensors: list[torch.Tensor]) -> None:
    """Sizes of packed tensors never vary: without this they would become symbols that nothing
    guards.
    """
    tracing = TracingContext.try_get()
    if tracing is None:
        return
    for index, tensor in enumerate(tensors):
        tracing.tensor_to_context[tensor] = StatefulSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
            constraint_sizes=[None] * tensor.dim(),
            tensor_source=ConstantSource(f"ternc_packed_{index}"),
            shape_env_to_source_to_symbol_cache={},
        )


def _compile_eager(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return gm.forward


def _compile_aot_eager(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    _forget_dynamo(gm)
    return lookup_backend("aot_eager")(gm, inputs)


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(sorted(known))}")
    return dict(known[mode])


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    from torch._inductor import config

    known = config.get_config_copy()
    patches = {key.replace("-", "_"): value for key, value in settings.items()}
    if unknown := [key for key in patches if key not in known]:
        raise UnknownOptionError(
            unknown, ["every setting of torch._inductor.config, such as 'cpp_wrapper'"]
        )
    return patches


def _keeps_static_addresses(inputs: list[Any]) -> bool:
    """CUDA graphs need to know which inputs keep their address: Dynamo's metadata says so."""
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs)


def _mark_packed(gm: fx.GraphModule) -> None:
    """Packed inputs get what Dynamo gives its own: a source, unique, and the mark of an address
    that stays, so that no replay of a CUDA graph copies them.
    """
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if "ternc_packed" in node.meta:
            node._dynamo_source = ConstantSource(f"ternc_packed_{index}")
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def _forget_dynamo(gm: fx.GraphModule) -> None:
    """Without Dynamo's metadata the graph takes AOTAutograd's plain path, which changes less
    between versions.
    """
    gm.meta.clear()
    gm.__dict__.pop("_param_name_to_source", None)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.__dict__.pop("_dynamo_source", None)
