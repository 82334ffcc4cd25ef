"""ternc::linear on the CPU: against other routes, and against what memory and multipliers allow.

A sample is one call of the op from Python, activation quantisation included, on weights out of
cache (--hot: one copy, over and over). Exit status 1 where floating-point activations take longer
than F.linear in fp32 (--bits 0 --peers fp32).

python benchmarks/bench_linear.py --shapes 4096x4096 --tokens 1 16 --threads 2 --planes 1 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import peers  # noqa: E402
import roofline  # noqa: E402
from limits import FAST_TILE_SECONDS, TILE_OPERATIONS, Limits  # noqa: E402
from reference import linear_arguments, random_quantized  # noqa: E402

from ternc.formats import layouts, pack  # noqa: E402
from ternc.runtime import cpu, ops  # noqa: E402
from ternc.runtime.dispatch import last_kernel  # noqa: E402
from ternc.runtime.ops import linear  # noqa: E402

CHECKED_TOKENS = 4
"""From the first to the last of a call of all: few tokens alone would take another kernel."""
LANES, DENSE = 10, 14
"""Layout numbers: 10 + planes, and one plane in 1.6 bits."""


def shape(text: str) -> tuple[int, int]:
    """`KxN`, in_features x out_features -> (N, K)."""
    columns, rows = text.split("x")
    return int(rows), int(columns)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=shape, nargs="*", default=[shape("4096x4096")])
    parser.add_argument("--drawn", type=int, default=4, help="shapes drawn from the commit")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--planes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[128], help="0: row scales")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 0], help="of activations")
    parser.add_argument("--peers", nargs="*", default=list(peers.ALL), choices=list(peers.ALL))
    parser.add_argument("--hot", action="store_true", help="one copy of every weight")
    parser.add_argument("--dense", action="store_true", help="one plane in 1.6 bits too")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--plot", help="PNG for the rooflines (needs the extra `plot`)")
    return parser.parse_args()


def ternc_contender(
    rows: int, x: torch.Tensor, layout: int, group_size: int, bits: int, hot: bool
) -> common.Contender:
    """Checks some tokens of its output against the eager reference before it may run."""
    planes = layouts.get(layout).planes
    packed = pack(random_quantized(rows, x.shape[1], planes, group_size), layout)
    checked = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_TOKENS)).long()
    seen = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))[checked]
    assert last_kernel(packed.weight) == cpu.isa(), "another kernel ran"
    expected = linear.reference(*linear_arguments(x[checked], packed, None, bits))
    if bits:
        assert torch.equal(seen, expected)
    else:
        assert (seen - expected).norm() <= 1e-6 * expected.norm()
    nbytes = sum(t.nbytes for t in (packed.weight, packed.multiplier) if t is not None)
    arguments = [linear_arguments(x, packed, None, bits)]
    for _ in range(0 if hot else common.copies_of(nbytes) - 1):
        copy = list(arguments[0])
        copy[1] = packed.weight.clone()
        copy[3] = None if packed.multiplier is None else packed.multiplier.clone()
        arguments.append(tuple(copy))
    scales = f"g{group_size}" if group_size else "row"
    size = " dense" if layout == DENSE else ""
    name = f"ternc x{planes}{size} {scales} a{bits or 'f'}"
    run = torch.ops.ternc.linear.default
    return common.Contender(name, lambda i: run(*arguments[i]), len(arguments), nbytes)


def measure(
    size: tuple[int, int], tokens: int, options: argparse.Namespace, limits: Limits
) -> list[dict[str, Any]]:
    """One row a contender, with the limits of the same rounds, or why it is not here."""
    rows, columns = size
    x = torch.randn(tokens, columns)
    torch.compiler.reset()  # an earlier table's stacks count as recompilations
    built = {name: peers.ALL[name](rows, x, options.hot) for name in options.peers}
    missing = {name: why for name, why in built.items() if isinstance(why, str)}
    contenders = [peer for peer in built.values() if not isinstance(peer, str)]
    contenders += [
        ternc_contender(rows, x, layout, group_size, bits, options.hot)
        for layout in [*(LANES + planes for planes in options.planes), *[DENSE] * options.dense]
        for group_size in options.groups
        for bits in options.bits
    ]
    limits.clear()
    common.interleave(contenders, options.rounds, limits, rows * columns // 4)
    base = contenders[0].best
    work = 2 * tokens * rows * columns
    place = {"K x N": f"{columns}x{rows}", "tokens": tokens}
    rows_found = [
        place
        | {
            "kernel": c.name,
            "bits/w": 8 * c.nbytes / (rows * columns),
            "best us": c.best * 1e6,
            "median us": c.median * 1e6,
            "% of read": percent(c.nbytes / c.best, limits.read.best),
            "median": percent(c.nbytes / c.median, limits.read.median),
            "GOP/s": work / c.best / 1e9,
            "% of multiply": percent(work / c.best, limits.multiply.best),
            f"x {contenders[0].name}": base / c.best,
            "read GB/s": limits.read.best / 1e9,
            "multiply GOP/s": None if not limits.multiply.best else limits.multiply.best / 1e9,
            "slow tile samples": len(c.slow),
        }
        for c in contenders
    ]
    absent = [place | {"kernel": name, "note": f"not run: {why}"} for name, why in missing.items()]
    return rows_found + absent


def percent(rate: float, limit: float | None) -> float | None:
    return None if limit is None else 100 * rate / limit


def describe(table: list[dict[str, Any]], limits: Limits) -> str:
    """The limits over the whole run in one line."""
    table = [row for row in table if "note" not in row]
    reads = [row["read GB/s"] for row in table]
    text = f"read limit {min(reads):.1f} to {max(reads):.1f} GB/s (best samples of each table)"
    if rates := [row["multiply GOP/s"] for row in table if row["multiply GOP/s"]]:
        text += f"; {limits.unit} {min(rates):.0f} to {max(rates):.0f} GOP/s"
    if limits.tiles.samples:
        nanoseconds = [1e9 * limits.threads * TILE_OPERATIONS / s for s in limits.tiles.samples]
        fast = sum(n < 1e9 * FAST_TILE_SECONDS for n in nanoseconds) / len(nanoseconds)
        text += f"; tile probe {min(nanoseconds):.1f} ns, fast in {100 * fast:.0f} % of probes"
    return text


def slower_than_floats(table: list[dict[str, Any]]) -> list[str]:
    """Rows with floating-point activations that take longer than F.linear in fp32 beside them."""
    table = [row for row in table if "note" not in row]
    fp32 = {
        (row["K x N"], row["tokens"]): row["best us"]
        for row in table
        if row["kernel"] == "F.linear float32"
    }
    return [
        f"{row['K x N']}, {row['tokens']} tokens: {row['kernel']}"
        for row in table
        if row["kernel"].endswith(" af")
        and row["best us"] > fp32.get((row["K x N"], row["tokens"]), float("inf"))
    ]


def main() -> None:
    options = parse()
    if options.plot:
        roofline.load()  # before the work, not after it
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    ops.register()
    if (isa := cpu.isa()) is None:
        sys.exit("the C++ library is not loaded: there is nothing to measure")
    limits = Limits(options.threads, isa)
    facts = common.machine(options.threads) | {"hot": options.hot, "multiply": limits.unit}
    table = []
    with torch.inference_mode():
        for size in [*options.shapes, *common.drawn_shapes(options.drawn)]:
            for tokens in options.tokens:
                table += measure(size, tokens, options, limits)
                if options.json:
                    common.write(table, facts, options.json)
                print(f"{size[1]}x{size[0]}, {tokens} tokens: done", file=sys.stderr)
    print(describe(table, limits))
    common.show(table, facts, options.json)
    if options.plot:
        roofline.draw([row for row in table if "note" not in row], facts, options.plot)
    if slower := slower_than_floats(table):
        sys.exit("slower than F.linear float32: " + "; ".join(slower))


if __name__ == "__main__":
    main()
