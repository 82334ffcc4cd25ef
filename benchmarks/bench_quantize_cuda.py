"""Norm, activation and Hadamard with int8 in one kernel on a GPU, beside a copy of the input.

    python benchmarks/bench_quantize_cuda.py --device cuda --tokens 8192 --peers

Inputs rotate beyond the L2 cache, calls run back to back in one CUDA graph, median of replays.
`of copy`: bytes read and written a second, over those of a copy of the same input. `inductor us`,
with --peers: the same definition in plain PyTorch under torch.compile, the transform a product with
the matrix in bf16 (whose sums it rounds before it quantises them).
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
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

from ternc.runtime import ops  # noqa: E402
from ternc.runtime.ops import (  # noqa: E402
    activate_quantize,
    fake_quantize,
    hadamard,
    norm_quantize,
)

CHECKED_TOKENS = 256
"""What the definition takes at once: every token is compared."""
MOST_DIFFERENT = 1e-3
"""Share of integers, by 1: sums are taken in another order."""

Inputs = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one width: `call` and `plain` take `inputs` tensors x bf16 [M, K]."""

    name: str
    width: int
    call: Callable[..., Any]
    reference: Callable[..., Any]
    """Its definition: (..., q, sx), or the values."""
    plain: Callable[..., Any]
    """What Inductor compiles beside it."""
    bytes_an_element: int
    """Read and written; x is bf16."""
    inputs: int = 1
    integers: bool = True
    """At most MOST_DIFFERENT of them may differ from the definition's."""


def cases() -> list[Case]:
    found = [norm(4096, 0), norm(4096, 4096), norm(2560, 0), norm(6912, 0)]
    found += [activation(4096, 4096, "none", False), activation(2560, 512, "none", False)]
    found += [activation(14336, 2048, "none", False), activation(6912, 256, "none", False)]
    found += [activation(14336, 0, "silu", True), activation(6912, 0, "silu", True)]
    found += [activation(14336, 2048, "silu", True), activation(6912, 256, "silu", True)]
    found += [rotation(4096, 4096), rotation(14336, 2048), rotation(6912, 256)]
    return [*found, training(4096), training(14336)]


def norm(width: int, block: int) -> Case:
    gain = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    given = signs(width) if block else None
    rest = (gain, None, "rms", 1e-5, 0.0, True, given, block, 8)
    rotate = matrix_product(given, block)
    return Case(
        f"RMSNorm{with_block(block)} + int8",
        width,
        lambda x: torch.ops.ternc.norm_quantize(x, *rest, False),
        lambda x: norm_quantize.reference(x, *rest, False)[1:],
        lambda x: plain_int8(rotate(F.rms_norm(x, (width,), gain, 1e-5))),
        3,
    )


def activation(width: int, block: int, name: str, gated: bool) -> Case:
    given = signs(width) if block else None
    rest = (name, given, block, 8)
    rotate = matrix_product(given, block)

    def pair(x: torch.Tensor, *up: torch.Tensor) -> tuple[Any, ...]:
        return x, (up[0] if gated else None), *rest

    def plain(x: torch.Tensor, *up: torch.Tensor) -> Any:
        return plain_int8(rotate(F.silu(x) * up[0] if gated else x))

    return Case(
        f"{f'{name}(gate) * up' if gated else 'nothing'}{with_block(block)} + int8",
        width,
        lambda *x: torch.ops.ternc.activate_quantize(*pair(*x)),
        lambda *x: activate_quantize.reference(*pair(*x)),
        plain,
        5 if gated else 3,
        2 if gated else 1,
    )


def rotation(width: int, block: int) -> Case:
    given = signs(width)
    return Case(
        f"Hadamard {block}",
        width,
        lambda x: torch.ops.ternc.hadamard(x, given, block),
        lambda x: hadamard.reference(x, given, block),
        matrix_product(given, block),
        4,
        integers=False,
    )


def training(width: int) -> Case:
    return Case(
        "fake int8, values in bf16",
        width,
        lambda x: torch.ops.ternc.fake_quantize_act(x, 8),
        lambda x: fake_quantize.activation_reference(x, 8),
        lambda x: fake_quantize.activation_composite(x, 8),
        4,
        integers=False,
    )


def matrix_product(given: torch.Tensor | None, block: int) -> Callable[[torch.Tensor], Any]:
    """The rotation as a product with its matrix; nothing without a block."""
    if not block:
        return lambda x: x
    unit = torch.eye(block, device="cuda")
    matrix = hadamard.reference(unit, None, block).to(torch.bfloat16)
    flips = given.to(torch.bfloat16)  # type: ignore[union-attr]
    return lambda x: ((x * flips).view(-1, block) @ matrix).view(x.shape)


def plain_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale a token, as anybody writes it."""
    t = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * (127.0 / t)).round().clamp(-127, 127).to(torch.int8), t / 127.0


def signs(width: int) -> torch.Tensor:
    return torch.randint(0, 2, (width,), dtype=torch.int8, device="cuda") * 2 - 1


def with_block(block: int) -> str:
    return f", Hadamard {block} with signs" if block else ""


def random_inputs(case: Case, tokens: int) -> Inputs:
    shape = (case.inputs, tokens, case.width)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()


def measure(case: Case, tokens: int, peers: bool = False) -> dict[str, Any]:
    from ternc.runtime.kernels.triton import timing

    nbytes = 2 * tokens * case.width * case.inputs
    copies = min(timing.rotation(192 << 20, nbytes), 24)
    inputs = [random_inputs(case, tokens) for _ in range(copies)]
    row: dict[str, Any] = {"kernel": case.name, "M": tokens, "K": case.width}
    row["differs"] = compare(case, inputs[0])
    row["us"] = timing.graph_time([lambda x=x: case.call(*x) for x in inputs])
    pairs = [(torch.empty_like(x[0]), x[0]) for x in inputs]
    row["copy us"] = timing.graph_time([lambda p=p: p[0].copy_(p[1]) for p in pairs])
    row["of copy"] = row["copy us"] / row["us"] * case.bytes_an_element / 4
    if peers:
        compiled = torch.compile(case.plain, dynamic=False)
        row["inductor us"] = timing.graph_time([lambda x=x: compiled(*x) for x in inputs])
        torch.compiler.reset()
    return row


def compare(case: Case, inputs: Inputs) -> float:
    """Share of integers or values that differ from the definition's."""
    seen, different = case.call(*inputs), 0
    parts = (seen[-2] if case.integers else seen).split(CHECKED_TOKENS)
    for part, *rows in zip(parts, *(x.split(CHECKED_TOKENS) for x in inputs), strict=True):
        expected = case.reference(*rows)
        different += int((part != (expected[0] if case.integers else expected)).sum())
    return different / inputs[0].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 8192])
    parser.add_argument("--peers", action="store_true", help="Inductor beside each row")
    parser.add_argument("--lock", help="file: compile beside other processes, time alone")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.device != "cuda":
        print("bench_quantize_cuda.py measures GPUs: --device cuda")
        return
    ops.register()
    torch.manual_seed(0)
    rows, wrong = [], []
    if args.lock:
        with common.turn(args.lock, alone=False):
            for tokens in args.tokens:
                for case in cases():
                    case.call(*random_inputs(case, tokens))
    with common.turn(args.lock, alone=True):
        for tokens in args.tokens:
            for case in cases():
                rows.append(measure(case, tokens, args.peers))
                if case.integers and rows[-1]["differs"] > MOST_DIFFERENT:
                    wrong.append(f"{case.name}, {case.width} columns, {tokens} tokens")
                torch.cuda.empty_cache()
    print(
        tabulate.tabulate(
            rows, headers="keys", floatfmt=("", ".0f", ".0f", ".1e", ".2f", ".2f", ".3f", ".2f")
        )
    )
    if args.json:
        facts = {
            "commit": common.commit(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit(f"over {MOST_DIFFERENT:.1%} of q differ: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
