"""`ternc info`: torch, processor, GPU, which kernels run here and why the others do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

from ternc.cli.console import add_json_option, counted, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc info`."""
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print what is here."""
    info = collect()
    if namespace.json:
        print_json(info)
    else:
        print(describe(info))
    return 0


def collect() -> dict[str, Any]:
    """Every fact as plain JSON types. Loads the C++ library, compiling it if need be."""
    import torch

    import ternc
    from ternc.runtime import cpu, ops

    ops.register()
    status = cpu.status()
    available = cpu.available()
    return {
        "ternc": ternc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "library": {
            "state": _library_state(status["library"], list(ternc.__path__)),
            "path": status["library"],
            "why_not": status["reason"],
        },
        "isa": status["isa"],
        "isas": [
            {"name": name, "available": why_not is None, "why_not": why_not}
            for name, why_not in available.items()
        ],
        "gpu": _gpu(),
        "layouts": _layouts(status),
    }


def describe(info: dict[str, Any]) -> str:
    """The facts as text, one paragraph a subject."""
    import tabulate

    library, gpu = info["library"], info["gpu"]
    facts = [
        ("ternc", info["ternc"]),
        ("torch", info["torch"]),
        ("Python", f"{info['python']} on {info['machine']}, {counted(info['threads'], 'thread')}"),
        (
            "C++ library",
            _first_line(library["why_not"]) or f"{library['state']}: {library['path']}",
        ),
        ("instruction set", info["isa"] or "none: the eager reference runs"),
        ("GPU", gpu["why_not"] or f"{gpu['device']}, Triton {gpu['triton']}"),
    ]
    isas = [(isa["name"], isa["why_not"] or "yes") for isa in info["isas"]]
    layouts = [
        (layout["number"], layout["name"], layout["weight"], layout["cpu"], layout["cuda"])
        for layout in info["layouts"]
    ]
    parts = [tabulate.tabulate(facts, tablefmt="plain")]
    if isas:
        parts.append(tabulate.tabulate(isas, ("instruction set", "available"), tablefmt="simple"))
    headers = ("layout", "name", "weight", "kernel on the CPU", "kernel on a GPU")
    parts.append(tabulate.tabulate(layouts, headers, tablefmt="simple", colalign=("left",) * 5))
    return "\n\n".join(parts)


def _first_line(text: str | None) -> str | None:
    """A compiler's output is long; --json has it whole."""
    return text.splitlines()[0] if text else None


def _library_state(path: object, homes: list[str]) -> str:
    if path is None:
        return "none"
    return "built at install" if str(Path(str(path)).parent) in homes else "compiled at first use"


def _gpu() -> dict[str, Any]:
    import torch

    from ternc.runtime import gpu

    found = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    return {
        "available": found,
        "device": torch.cuda.get_device_name() if found else None,
        "triton": importlib.metadata.version("triton") if triton else None,
        "why_not": gpu.missing(),
    }


def _layouts(status: dict[str, Any]) -> list[dict[str, Any]]:
    """For each byte layout: the kernel of `ternc::linear` that reads it, or why there is none."""
    from ternc.formats import layouts
    from ternc.formats.quantized import kind
    from ternc.runtime import gpu

    missing = gpu.missing()
    return [
        {
            "number": number,
            "name": layout.name,
            "weight": kind(layout.planes),
            "cpu": _kernel(layout, "cpu", status["isa"], "no C++ library"),
            "cuda": _kernel(layout, "cuda", None if missing else "Triton", missing),
        }
        for number, layout in sorted(layouts.ALL.items())
    ]


def _kernel(layout: Any, device: str, kernel: str | None, why_not: str | None) -> str:
    from ternc.formats.dense import NUMBER
    from ternc.formats.layouts import resident_layout

    dense = device == "cpu" and layout.number == NUMBER
    if resident_layout(layout.planes, device) != layout.number and not dense:
        return "none: converted when loaded"
    return kernel or f"eager reference: {why_not}"
