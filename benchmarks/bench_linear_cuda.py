"""ternc::linear on a GPU beside bf16, fp8 and int8 products of torch, each with its floor.

python benchmarks/bench_linear_cuda.py --device cuda --shapes 4096x4096 --tokens 1 16

Calls back to back in one CUDA graph, weights rotated beyond the L2 cache, median of replays.
Quantisation of the activations is inside every row but `int8 raw`. The floor of a row is the
larger of a kernel's ramp plus its bytes at read speed, and its operations at the tensor cores'
peak.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import peers_cuda  # noqa: E402
from packed_weights import packed_on_gpu  # noqa: E402
from peers_cuda import CHECKED_TOKENS, Way  # noqa: E402
from reference import linear_arguments  # noqa: E402

from ternc.formats import Packed  # noqa: E402
from ternc.runtime import dispatch, ops  # noqa: E402
from ternc.runtime.ops import linear  # noqa: E402

SHAPES = ["4096x4096", "4096x14336", "14336x4096"]
TOKENS = [1, 8, 64, 256, 2048]
"""What a few minutes give, compilation included; the tables of results/ name their own."""


ALONE_TOKENS = 16
"""Up to here every ternc kernel is also timed with none overlapping the one before."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="in_features x out_features")
    parser.add_argument("--drawn", type=int, default=1, help="shapes drawn from the commit")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--planes", type=int, nargs="*", default=[1])
    parser.add_argument("--groups", type=int, nargs="+", default=[0, 128], help="0: row scales")
    parser.add_argument("--commit", help="where the tree has no git folder")
    peers = list(peers_cuda.ALL)
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    parser.add_argument("--lock", help="file: compile beside other processes, time alone")
    parser.add_argument("--json", help="file for the rows")
    return parser.parse_args()


_checked: set[tuple[int, ...]] = set()


@functools.lru_cache(maxsize=8)
def packed_weight(rows: int, columns: int, planes: int, group_size: int) -> Packed:
    return packed_on_gpu(rows, columns, planes, group_size)


def ternc_way(
    x: torch.Tensor, rows: int, planes: int, group_size: int, copies: Callable[[int], int]
) -> Way:
    """Checked bit for bit against the eager reference on the first tokens, once a problem."""
    packed = packed_weight(rows, x.shape[1], planes, group_size)
    arguments = linear_arguments(x, packed)
    problem = (*x.shape, rows, planes, group_size)
    if problem not in _checked:
        seen = torch.ops.ternc.linear(*arguments)
        kernel = dispatch.last_kernel(packed.weight)
        expected = linear.reference(x[:CHECKED_TOKENS], *arguments[1:])
        assert torch.equal(seen[:CHECKED_TOKENS], expected), "the kernel differs"
        assert kernel != "reference", "no kernel ran"
        _checked.add(problem)
    nbytes = sum(t.nbytes for t in (packed.weight, packed.multiplier) if t is not None)
    calls = []
    for _ in range(copies(nbytes)):
        weight = packed.weight.clone()
        multiplier = None if packed.multiplier is None else packed.multiplier.clone()
        copy = (x, weight, arguments[2], multiplier, *arguments[4:])
        torch.ops.ternc.linear(*copy)
        calls.append(lambda copy=copy: torch.ops.ternc.linear(*copy))
    scales = f"g{group_size}" if group_size else "row"
    return Way(f"ternc x{planes} {scales}", calls, nbytes, "int8")


def measure(
    columns: int, rows: int, tokens: int, args: argparse.Namespace, timed: bool = True
) -> list[dict[str, Any]]:
    """One row of the table for every way; none, and only checks, where not `timed`."""
    from ternc.runtime.kernels.triton import launch, timing

    def copies(nbytes: int) -> int:
        return timing.rotation(common.ROTATED if tokens <= 512 else 4 * nbytes, nbytes)

    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    makers: list[Callable[[], Way | None]] = [
        lambda p=p, g=g: ternc_way(x, rows, p, g, copies) for p in args.planes for g in args.groups
    ]
    makers += [lambda name=name: peers_cuda.ALL[name](x, rows, copies) for name in args.peers]
    found = []
    for make in makers:
        way = make()
        if way is None:
            continue
        lonely = way.name.startswith("ternc") and tokens <= ALONE_TOKENS
        if not timed:
            with launch.alone() if lonely else contextlib.nullcontext():
                way.calls[0]()
            way.calls[0]()
            torch.cuda.synchronize()
            continue
        us = timing.graph_time(way.calls)
        row = {"K": columns, "N": rows, "M": tokens, "way": way.name, "us": us}
        if lonely:
            with launch.alone():
                row["us, not overlapped"] = timing.graph_time(way.calls)
        floor = way.floor(rows, columns, tokens)
        row |= {"floor us": floor, "x floor": us / floor}
        row["TOP/s"] = 2 * rows * columns * tokens / us / 1e6
        found.append(row)
        del way
    by_name = {row["way"]: row["us"] for row in found}
    for row in found:
        row["x bf16"] = by_name["bf16"] / row["us"] if "bf16" in by_name else None
    return found


def facts(args: argparse.Namespace) -> dict[str, Any]:
    import triton

    return {
        "commit": args.commit or common.commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gemlite": peers_cuda.gemlite_version() if "gemlite" in args.peers else "not run",
    }


def main() -> None:
    args = parse()
    if args.device != "cuda":
        print("bench_linear_cuda.py measures GPUs: --device cuda")
        return
    ops.register()
    torch.manual_seed(0)
    if args.commit:
        common.commit = lambda: args.commit
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    shapes += [(columns, rows) for rows, columns in common.drawn_shapes(args.drawn)]
    table = []
    if args.lock:
        with common.turn(args.lock, alone=False):
            for (columns, rows), tokens in itertools.product(shapes, args.tokens):
                measure(columns, rows, tokens, args, timed=False)
                torch.cuda.empty_cache()
    with common.turn(args.lock, alone=True):
        for (columns, rows), tokens in itertools.product(shapes, args.tokens):
            found = measure(columns, rows, tokens, args)
            table += found
            times = ", ".join(f"{row['way']} {row['us']:.2f}" for row in found)
            print(f"{columns}->{rows} M={tokens}: {times}", flush=True)
            torch.cuda.empty_cache()
    common.show(table, facts(args), args.json)


if __name__ == "__main__":
    main()
