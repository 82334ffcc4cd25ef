"""Schemas of ternc:: operators -> C++ that calls the library's entry points without the dispatcher.

Inductor's C++ wrapper calls an operator directly where it knows a C function for it; any other goes
through the dispatcher as boxed values, 4 to 8 us a call. The function is written into the code that
Inductor compiles: it hands the places of its arguments to `ternc_entry_<op>` (csrc/entry.h).
"""

from __future__ import annotations

from typing import Any

import torch

from ternc.runtime import cpu

_C_TYPES = {
    "Tensor": ("AtenTensorHandle",),
    "Optional[Tensor]": ("const AtenTensorHandle*",),
    "List[Tensor]": ("const AtenTensorHandle*", "int64_t"),
    "List[int]": ("const int64_t*", "int64_t"),
    "int": ("int64_t",),
    "float": ("double",),
    "bool": ("int32_t",),
    "str": ("const char*",),
    "ScalarType": ("int32_t",),
}
"""C types of the parameters that an argument becomes: what Inductor's C++ wrapper hands over."""
_FIND = """int ternc_entries;
#include <dlfcn.h>
#include <stdexcept>
static void (*ternc_find(const char* name))(const void* const*) {{
  void* library = dlopen("{library}", RTLD_NOLOAD | RTLD_NOW);
  void* entry = library == nullptr ? nullptr : dlsym(library, name);
  if (entry == nullptr)
    throw std::runtime_error("ternc: {library} is not loaded: call ternc.runtime.ops.register()");
  return reinterpret_cast<void (*)(const void* const*)>(entry);
}}"""
_CALL = """inline AOTITorchError aoti_torch_cpu_{op}({parameters}) {{
  static const auto entry = ternc_find("ternc_entry_{op}");
  const void* const slots[] = {{{slots}}};
  entry(slots);
  return 0;
}}"""


class Callers(dict[Any, list[str]]):
    """Operator -> C++ that calls it. Pickled and copied by names: Inductor keys its caches on it,
    and an operator itself cannot be pickled.
    """

    def __init__(self, texts: dict[str, list[str]]) -> None:
        super().__init__({getattr(torch.ops.ternc, op).default: t for op, t in texts.items()})
        self._texts = texts

    def __reduce__(self) -> tuple[Any, ...]:
        return Callers, (self._texts,)


def inductor_settings() -> dict[str, Any]:
    """Settings under which Inductor's C++ wrapper calls the library; none where there is none."""
    from torch._inductor import config

    library = cpu.library_name()
    if library is None or not hasattr(config.aot_inductor, "custom_ops_to_c_shims"):
        return {}
    texts = {op: [_caller(getattr(torch.ops.ternc, op).default._schema)] for op in cpu.ENTRIES}
    texts[cpu.ENTRIES[0]].insert(0, _FIND.format(library=library))
    return {"aot_inductor.custom_ops_to_c_shims": Callers(texts)}


def _caller(schema: torch._C.FunctionSchema) -> str:
    """The C++ function for one operator; Inductor puts `extern` in front of it."""
    parameters, slots = [], []
    for argument in schema.arguments:
        # `real_type` tells a ScalarType from an int.
        for i, c_type in enumerate(_C_TYPES[str(argument.real_type)]):
            parameter = f"{argument.name}_{i}"
            parameters.append(f"{c_type} {parameter}")
            pointer = c_type.endswith("*") or c_type == "AtenTensorHandle"
            slots.append(parameter if pointer else f"&{parameter}")
    for i in range(len(schema.returns)):
        parameters.append(f"AtenTensorHandle* result_{i}")
        slots.append(f"result_{i}")
    op = schema.name.removeprefix("ternc::")
    return _CALL.format(op=op, parameters=", ".join(parameters), slots=", ".join(slots))
