"""ternc::linear against F.linear in fp32 and bf16, and against the memory's read limit, on the CPU.

python benchmarks/bench_linear.py --shapes 4096x4096 --tokens 1 16 --threads 2 --planes 1 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
from reference import linear_arguments, random_quantized  # noqa: E402

from ternc.formats import pack  # noqa: E402
from ternc.runtime import cpu, ops  # noqa: E402
from ternc.runtime.ops import linear  # noqa: E402

CHECKED_TOKENS = 4


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
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", help="file for the rows")
    return parser.parse_args()


def torch_contender(dtype: torch.dtype, rows: int, x: torch.Tensor) -> common.Contender:
    columns = x.shape[1]
    nbytes = rows * columns * dtype.itemsize
    weights = [torch.randn(rows, columns).to(dtype) for _ in range(common.copies_of(nbytes))]
    x = x.to(dtype)
    name = f"F.linear {str(dtype).removeprefix('torch.')}"
    return common.Contender(name, lambda i: F.linear(x, weights[i]), len(weights), nbytes)


def ternc_contender(
    rows: int, x: torch.Tensor, planes: int, group_size: int, bits: int
) -> common.Contender:
    """Checks its output against the eager reference before it may run."""
    packed = pack(random_quantized(rows, x.shape[1], planes, group_size), "cpu")
    few = linear_arguments(x[:CHECKED_TOKENS], packed, None, bits)
    seen, expected = torch.ops.ternc.linear(*few), linear.reference(*few)
    if bits:
        assert torch.equal(seen, expected)
    else:
        assert (seen - expected).norm() <= 1e-6 * expected.norm()
    nbytes = sum(t.nbytes for t in (packed.weight, packed.multiplier) if t is not None)
    arguments = [linear_arguments(x, packed, None, bits)]
    for _ in range(common.copies_of(nbytes) - 1):
        copy = list(arguments[0])
        copy[1] = packed.weight.clone()
        copy[3] = None if packed.multiplier is None else packed.multiplier.clone()
        arguments.append(tuple(copy))
    scales = f"g{group_size}" if group_size else "row"
    name = f"ternc x{planes} {scales} a{bits or 'f'}"
    run = torch.ops.ternc.linear
    return common.Contender(name, lambda i: run(*arguments[i]), len(arguments), nbytes)


def measure(
    size: tuple[int, int], tokens: int, options: argparse.Namespace, stream: common.Stream
) -> list[dict[str, Any]]:
    rows, columns = size
    x = torch.randn(tokens, columns)
    contenders = [torch_contender(dtype, rows, x) for dtype in (torch.float32, torch.bfloat16)]
    contenders += [
        ternc_contender(rows, x, planes, group_size, bits)
        for planes in options.planes
        for group_size in options.groups
        for bits in options.bits
    ]
    stream.samples.clear()
    common.interleave(contenders, options.rounds, stream)
    base = contenders[0]
    return [
        {
            "K x N": f"{columns}x{rows}",
            "tokens": tokens,
            "kernel": c.name,
            "bits/w": 8 * c.nbytes / (rows * columns),
            "best us": c.best * 1e6,
            "median us": c.median * 1e6,
            "% of read limit, best": 100 * c.nbytes / stream.best / c.best,
            "median": 100 * c.nbytes / stream.median / c.median,
            "GOP/s": 2 * tokens * rows * columns / c.best / 1e9,
            "x fp32, best": base.best / c.best,
            "x fp32, median": base.median / c.median,
        }
        for c in contenders
    ]


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    ops.register()
    if cpu.isa() is None:
        sys.exit("the C++ library is not loaded: there is nothing to measure")
    stream = common.Stream(options.threads)
    table = []
    with torch.inference_mode():
        for size in [*options.shapes, *common.drawn_shapes(options.drawn)]:
            for tokens in options.tokens:
                table += measure(size, tokens, options, stream)
                print(f"{size[1]}x{size[0]}, {tokens} tokens: done", file=sys.stderr)
    print(f"read limit {stream.best / 1e9:.1f} GB/s best, {stream.median / 1e9:.1f} median")
    common.show(table, common.machine(options.threads), options.json)


if __name__ == "__main__":
    main()
