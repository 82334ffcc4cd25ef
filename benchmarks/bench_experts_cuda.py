"""Mixtures of experts, rows of embeddings and dequantised weights on a GPU, beside torch in bf16.

    python benchmarks/bench_experts_cuda.py --device cuda

Calls back to back in one CUDA graph, weights rotated beyond the L2 cache, median of replays;
every output is compared with the definition's first, bit for bit. The tokens of the experts are
spread at random, their quantisation is inside. The floor of a row is the larger of a kernel's ramp
plus its bytes (of the experts that have tokens) at read speed, and its operations at the tensor
cores' peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from peers_cuda import PEAK_OPS_US, RAMP_US, READ_BYTES_US  # noqa: E402

from ternc.config import CODE_MAX  # noqa: E402
from ternc.formats import Packed, Quantized, pack  # noqa: E402
from ternc.formats.int8 import fit_int8  # noqa: E402
from ternc.runtime import dispatch, ops  # noqa: E402
from ternc.runtime.ops import dequantize, embedding, grouped_linear  # noqa: E402

EXPERTS, EXPERT_COLUMNS, EXPERT_ROWS = 8, 2048, 4096
VOCABULARY, WIDTH = 32_000, 4096
ROWS, COLUMNS = 14336, 4096
TOKENS = {"experts": [2, 64, 512, 8192], "embedding": [1, 64, 8192], "dequantize": [0]}
"""By table: tokens of a call; 0: it has none."""
FORMATS = {
    "int8": (0, 0),
    "x1 row": (1, 0),
    "x1 g128": (1, 128),
    "x2 row": (2, 0),
    "x3 row": (3, 0),
}
"""Planes and group size; no planes: int8."""


@dataclasses.dataclass
class Way:
    """One way to do the work: a call for every copy of its weight, and what bounds it."""

    name: str
    calls: list[Callable[[], torch.Tensor]]
    nbytes: int
    """Read and written by a call."""
    operations: int = 0
    peak: str = "int8"

    @property
    def floor(self) -> float:
        """Microseconds below which no kernel of this kind gets, with a warm GPU."""
        return max(RAMP_US + self.nbytes / READ_BYTES_US, self.operations / PEAK_OPS_US[self.peak])


def random_packed(rows: int, columns: int, name: str) -> Packed:
    """A random weight, made on the GPU, in its layout there."""
    planes, group = FORMATS[name]
    if not planes:
        return pack(fit_int8(torch.randn(rows, columns, device="cuda")), "cuda")
    most, groups = CODE_MAX[planes], -(-columns // group) if group else 0
    multiplier = torch.randint(1, 127 // most + 1, (rows, groups), device="cuda") if group else None
    return pack(
        Quantized(
            codes=torch.randint(-most, most + 1, (rows, columns), device="cuda", dtype=torch.int8),
            scale=torch.rand(rows, device="cuda") + 0.5,
            multiplier=None if multiplier is None else multiplier.to(torch.uint8),
            group_size=group,
            planes=planes,
        ),
        "cuda",
    )


def copies_of(packed: Packed) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Packed tensors of as many copies as are beyond the L2 cache."""
    from ternc.runtime.kernels.triton import timing

    count = timing.rotation(common.ROTATED, packed.weight.nbytes)
    weights = [packed.weight, *(packed.weight.clone() for _ in range(count - 1))]
    return [(weight, packed.scale, packed.multiplier) for weight in weights]


def weight_bytes(packed: Packed) -> int:
    multiplier = packed.multiplier
    return (
        packed.weight.nbytes
        + packed.scale.nbytes
        + (multiplier.nbytes if multiplier is not None else 0)
    )


def expert_ways(tokens: int) -> Iterator[Way]:
    """8 x 2048->4096: each token has one expert."""
    x = torch.randn(tokens, EXPERT_COLUMNS, device="cuda", dtype=torch.bfloat16)
    counts = torch.randint(0, EXPERTS, (tokens,), device="cuda").bincount(minlength=EXPERTS)
    ends = counts.cumsum(0).int()
    share = int((counts > 0).sum()) / EXPERTS
    rest = 2 * tokens * (EXPERT_COLUMNS + EXPERT_ROWS)
    operations = 2 * tokens * EXPERT_COLUMNS * EXPERT_ROWS
    for name in ("x1 row", "x1 g128", "x2 row", "x3 row"):
        packed = random_packed(EXPERTS * EXPERT_ROWS, EXPERT_COLUMNS, name)
        numbers = (EXPERTS, EXPERT_ROWS, packed.group_size, 8, packed.layout, x.dtype)
        copies = copies_of(packed)
        seen = torch.ops.ternc.grouped_linear(x, None, ends, *copies[0], *numbers)
        assert dispatch.last_kernel(packed.weight) == "triton_grouped", "no kernel ran"
        check(seen, grouped_linear.grouped_linear(x, None, ends, *copies[0], *numbers))
        calls = [
            lambda c=c, n=numbers: torch.ops.ternc.grouped_linear(x, None, ends, *c, *n)
            for c in copies
        ]
        nbytes = int(share * weight_bytes(packed)) + rest
        yield Way(f"ternc {name}", calls, nbytes, operations)
    shape = (EXPERTS, EXPERT_COLUMNS, EXPERT_ROWS)
    stacks = [torch.randn(shape, device="cuda", dtype=x.dtype) for _ in range(3)]
    nbytes = int(share * stacks[0].nbytes) + rest
    calls = [lambda w=w: F.grouped_mm(x, w, offs=ends) for w in stacks]
    yield Way("bf16 grouped_mm", calls, nbytes, operations, "bf16")


def embedding_ways(tokens: int) -> Iterator[Way]:
    """Rows of 32,000 x 4096, in bf16."""
    dtype = torch.bfloat16
    drawn = [torch.randint(0, VOCABULARY, (tokens,), device="cuda") for _ in range(8)]
    written = tokens * WIDTH * dtype.itemsize
    for name in ("int8", "x1 g128", "x3 row"):
        packed = random_packed(VOCABULARY, WIDTH, name)
        numbers = (VOCABULARY, WIDTH, packed.group_size, packed.layout, dtype)
        copies = copies_of(packed)
        seen = torch.ops.ternc.embedding(drawn[0], *copies[0], *numbers)
        assert dispatch.last_kernel(packed.weight) == "triton_embedding", "no kernel ran"
        check(seen, embedding.reference(drawn[0], *copies[0], *numbers))
        calls = [
            lambda c=c, i=i, n=numbers: torch.ops.ternc.embedding(i, *c, *n)
            for i in drawn
            for c in copies
        ]
        read = tokens * weight_bytes(packed) // VOCABULARY
        yield Way(f"ternc {name}", calls, read + written)
    tables = [torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=dtype) for _ in range(2)]
    calls = [lambda w=w, i=i: F.embedding(i, w) for i in drawn for w in tables]
    yield Way("bf16 embedding", calls, 2 * written)


def dequantize_ways(_: int) -> Iterator[Way]:
    """The weight 4096->14336 as bf16, beside a copy of it."""
    dtype = torch.bfloat16
    written = ROWS * COLUMNS * dtype.itemsize
    for name in FORMATS:
        packed = random_packed(ROWS, COLUMNS, name)
        numbers = (ROWS, COLUMNS, packed.group_size, packed.layout, dtype)
        copies = copies_of(packed)[:4]
        seen = torch.ops.ternc.dequantize(*copies[0], *numbers)
        assert dispatch.last_kernel(packed.weight) == "triton_dequantize", "no kernel ran"
        check(seen, dequantize.reference(*copies[0], *numbers))
        calls = [lambda c=c, n=numbers: torch.ops.ternc.dequantize(*c, *n) for c in copies]
        yield Way(f"ternc {name}", calls, weight_bytes(packed) + written)
    weights = [torch.randn(ROWS, COLUMNS, device="cuda", dtype=dtype) for _ in range(2)]
    yield Way("bf16 copy", [lambda w=w: w.clone() for w in weights], 2 * written)


WAYS = {"experts": expert_ways, "embedding": embedding_ways, "dequantize": dequantize_ways}


def check(seen: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(seen, expected), "the kernel differs"


def measure(table: str, tokens: int) -> list[dict[str, Any]]:
    """A row for every way; the last one is bf16's."""
    from ternc.runtime.kernels.triton import timing

    found = []
    for way in WAYS[table](tokens):
        us = timing.graph_time(way.calls)
        row = {"table": table, "M": tokens, "way": way.name, "us": us, "floor us": way.floor}
        found.append(row | {"x floor": us / way.floor})
        way.calls.clear()
    for row in found:
        row["x bf16"] = found[-1]["us"] / row["us"]
    return found


def compile_ahead(tables: list[str]) -> None:
    """Every kernel of every row, checked but not timed."""
    for table in tables:
        for tokens in TOKENS[table]:
            for way in WAYS[table](tokens):
                way.calls[0]()
                way.calls.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def facts() -> dict[str, Any]:
    import triton

    return {
        "commit": common.commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tables", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--lock", help="file: compile beside other processes, time alone")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.device != "cuda":
        print("bench_experts_cuda.py measures GPUs: --device cuda")
        return
    ops.register()
    torch.manual_seed(0)
    if args.lock:
        with common.turn(args.lock, alone=False):
            compile_ahead(args.tables)
    rows = []
    with common.turn(args.lock, alone=True):
        for table in args.tables:
            for tokens in TOKENS[table]:
                rows += measure(table, tokens)
                torch.cuda.empty_cache()
    common.show(rows, facts(), args.json)


if __name__ == "__main__":
    main()
