"""Norm, activation function, Hadamard and int8 in one pass against `copy_` of the fp32 tensor.

A copy reads and writes each element once: the least that an unfused chain pays for every one of
its steps. Inputs rotate over at least 192 MB, and so does what copy_ writes to.

python benchmarks/bench_hadamard.py --widths 4096 --megabytes 2 --threads 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402

from ternc.runtime import cpu, ops  # noqa: E402
from ternc.runtime.ops import activate_quantize, hadamard, norm_quantize  # noqa: E402

WIDTHS = [768, 1024, 2560, 4096, 6912, 8192]
CHECKED_TOKENS = 4
"""From the first to the last: a kernel takes several short ones together."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of the fp32 tensor")
    parser.add_argument("--hot", action="store_true", help="one tensor over and over")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", help="file for the rows")
    return parser.parse_args()


def check(x: torch.Tensor, signs: torch.Tensor, block: int) -> None:
    """Some tokens of a call of all agree with their references before the ops may run."""
    checked = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS)).long()
    library, few = torch.ops.ternc, x[checked]
    rotated = library.hadamard(x, signs, block)[checked]
    assert torch.equal(rotated, hadamard.reference(few, signs, block))
    normed = (None, None, "rms", 1e-5, 0.0, False, signs, block, 8, False)
    q = library.norm_quantize(x, *normed)[1][checked]
    assert (q - norm_quantize.reference(few, *normed)[1]).abs().max() <= 1
    gated = ("silu", signs, block, 8)
    q = library.activate_quantize(x, x, *gated)[0][checked]
    assert (q - activate_quantize.reference(few, few, *gated)[0]).abs().max() <= 1


def contenders(width: int, options: argparse.Namespace) -> list[common.Contender]:
    block = min(width & -width, hadamard.MAX_BLOCK)
    tokens = max(1, round(options.megabytes * 2**20 / (4 * width)))
    nbytes = 4 * tokens * width
    copies = 1 if options.hot else common.copies_of(nbytes)
    xs = list(torch.randn(copies, tokens, width))
    targets = list(torch.zeros(copies, tokens, width))
    signs = torch.randint(0, 2, (width,), dtype=torch.int8) * 2 - 1
    gain = torch.rand(width) + 0.5
    check(xs[0], signs, block)
    library = torch.ops.ternc

    def normed(x: torch.Tensor, kind: str, block: int) -> torch.Tensor:
        signs_of = signs if block else None
        return library.norm_quantize.default(
            x, gain, None, kind, 1e-5, 0.0, False, signs_of, block, 8, False
        )[1]

    def gated(i: int, name: str, block: int) -> torch.Tensor:
        up = xs[(i + copies // 2) % copies]
        signs_of = signs if block else None
        return library.activate_quantize.default(xs[i], up, name, signs_of, block, 8)[0]

    kept: list[torch.Tensor | None] = [None] * copies

    def keep(i: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A result as large as its input goes to memory as cold as copy_'s: what round i freed."""
        kept[i] = None
        kept[i] = run()
        return kept[i]

    runs: dict[str, Callable[[int], torch.Tensor]] = {
        "copy_": lambda i: targets[i].copy_(xs[i]),
        "clone": lambda i: keep(i, xs[i].clone),
        "int8": lambda i: library.quantize_act.default(xs[i], 8)[0],
        "hadamard": lambda i: keep(i, lambda: library.hadamard.default(xs[i], signs, block)),
        "rms + int8": lambda i: normed(xs[i], "rms", 0),
        "layer + int8": lambda i: normed(xs[i], "layer", 0),
        "rms + hadamard + int8": lambda i: normed(xs[i], "rms", block),
        "silu * up + int8": lambda i: gated(i, "silu", 0),
        "silu * up + hadamard + int8": lambda i: gated(i, "silu", block),
        "gelu * up + int8": lambda i: gated(i, "gelu", 0),
    }
    return [common.Contender(name, run, copies, nbytes) for name, run in runs.items()]


def measure(width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    rivals = contenders(width, options)
    common.interleave(rivals, options.rounds)
    copy = rivals[0]
    return [
        {
            "width": width,
            "op": c.name,
            "best us": c.best * 1e6,
            "median us": c.median * 1e6,
            "x copy_, best": c.best / copy.best,
            "x copy_, median": c.median / copy.median,
        }
        for c in rivals
    ]


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    ops.register()
    if cpu.isa() is None:
        sys.exit("the C++ library is not loaded: there is nothing to measure")
    table = []
    with torch.inference_mode():
        for width in options.widths:
            table += measure(width, options)
            print(f"{width}: done", file=sys.stderr)
    common.show(table, common.machine(options.threads), options.json)


if __name__ == "__main__":
    main()
