"""Norm, activation and Hadamard with int8 in one kernel on a GPU, beside a copy of the input.

python benchmarks/bench_quantize_cuda.py --device cuda --tokens 8192

Inputs rotate beyond the L2 cache, calls run back to back in one CUDA graph, median of replays.
`of copy`: bytes read and written a second, over those of a copy of the same input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tabulate
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ternc.runtime import ops  # noqa: E402
from ternc.runtime.ops import activate_quantize, hadamard, norm_quantize  # noqa: E402

CHECKED_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one width: `call` takes x [M, K], `reference` is its definition."""

    name: str
    width: int
    call: Callable[[torch.Tensor], Any]
    reference: Callable[[torch.Tensor], Any]
    bytes_an_element: int
    """Read and written; x is bf16."""


def cases() -> list[Case]:
    library = torch.ops.ternc
    found = []

    def norm(width: int, block: int) -> Case:
        gain = torch.randn(width, device="cuda", dtype=torch.bfloat16)
        rest = (gain, None, "rms", 1e-5, 0.0, True, signs(width) if block else None, block, 8)
        return Case(
            f"RMSNorm{with_block(block)} + int8",
            width,
            lambda x: library.norm_quantize(x, *rest, False),
            lambda x: norm_quantize.reference(x, *rest, False)[1:],
            3,
        )

    def activation(width: int, block: int, name: str, gated: bool) -> Case:
        rest = (name, signs(width) if block else None, block, 8)

        def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return (x, x.flip(0)) if gated else (x, None)

        ups: dict[tuple[int, int], torch.Tensor] = {}

        def call(x: torch.Tensor) -> Any:
            if not gated:
                return library.activate_quantize(x, None, *rest)
            key = (x.data_ptr(), x.shape[0])
            if key not in ups:
                ups[key] = x.flip(0)
            return library.activate_quantize(x, ups[key], *rest)

        label = f"{name}(gate) * up" if gated else "nothing"
        return Case(
            f"{label}{with_block(block)} + int8",
            width,
            call,
            lambda x: activate_quantize.reference(*split(x), *rest),
            5 if gated else 3,
        )

    def rotation(width: int, block: int) -> Case:
        given = signs(width)
        return Case(
            f"Hadamard {block}",
            width,
            lambda x: library.hadamard(x, given, block),
            lambda x: hadamard.reference(x, given, block),
            4,
        )

    found += [norm(4096, 0), norm(4096, 4096), norm(2560, 0), norm(6912, 0)]
    found += [activation(4096, 4096, "none", False), activation(2560, 512, "none", False)]
    found += [activation(14336, 2048, "none", False), activation(6912, 256, "none", False)]
    found += [activation(14336, 0, "silu", True), activation(6912, 0, "silu", True)]
    found += [activation(14336, 2048, "silu", True), activation(6912, 256, "silu", True)]
    found += [rotation(4096, 4096), rotation(14336, 2048), rotation(6912, 256)]
    return found


def signs(width: int) -> torch.Tensor:
    return torch.randint(0, 2, (width,), dtype=torch.int8, device="cuda") * 2 - 1


def with_block(block: int) -> str:
    return f", Hadamard {block} with signs" if block else ""


def measure(case: Case, tokens: int) -> dict[str, Any]:
    from ternc.runtime.kernels.triton import timing

    nbytes = 2 * tokens * case.width
    copies = min(timing.rotation(192 << 20, nbytes), 24)
    inputs = [
        torch.randn(tokens, case.width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)
    ]
    seen, expected = (
        case.call(inputs[0][:CHECKED_TOKENS]),
        case.reference(inputs[0][:CHECKED_TOKENS]),
    )
    row: dict[str, Any] = {"kernel": case.name, "M": tokens, "K": case.width}
    if isinstance(seen, torch.Tensor):
        row["differs"] = (seen != expected).double().mean().item()
    else:
        differs = (seen[-2] != expected[0]).double().mean().item()
        assert differs <= 1e-3, f"{case.name}: {differs:.2g} of q differ"
        row["differs"] = differs
    row["us"] = timing.graph_time([lambda x=x: case.call(x) for x in inputs])
    outputs = [torch.empty_like(x) for x in inputs]
    pairs = list(zip(outputs, inputs, strict=True))
    row["copy us"] = timing.graph_time([lambda p=p: p[0].copy_(p[1]) for p in pairs])
    row["of copy"] = row["copy us"] / row["us"] * case.bytes_an_element / 4
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 8192])
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.device != "cuda":
        print("bench_quantize_cuda.py measures GPUs: --device cuda")
        return
    ops.register()
    torch.manual_seed(0)
    rows = []
    for tokens in args.tokens:
        for case in cases():
            rows.append(measure(case, tokens))
            torch.cuda.empty_cache()
    print(tabulate.tabulate(rows, headers="keys", floatfmt=("", ".0f", ".0f", ".1e", ".2f")))
    if args.json:
        facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
