"""python -m ternc.runtime.kernels.triton.tune --shapes 4096x4096 ...: the table of this GPU.

Times every configuration of the search space on every shape (in_features x out_features) and
number of tokens, and writes the fastest to runtime/kernels/tuned/<gpu>.json. Never runs by itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ternc.config import CODE_MAX
from ternc.formats import Quantized, pack
from ternc.formats.quantized import group_count
from ternc.runtime.kernels.triton import (
    gemm_config,
    launch,
    linear_gemm,
    linear_gemv,
    select,
    timing,
)
from ternc.runtime.kernels.triton.gemm_config import GemmConfig
from ternc.runtime.kernels.triton.linear_gemv import GemvConfig, Norm
from ternc.runtime.kernels.triton.product import Product
from ternc.runtime.kernels.triton.weight import Weight

ROTATED_BYTES = 192 << 20
"""Weights of a measurement: several times the L2 cache."""

MARGIN = 1.02
"""A configuration must be this much faster than the one in use to enter the table."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kind of weight to tune for."""

    columns: int
    rows: int
    planes: int
    group_size: int
    kind: str = select.GEMV
    """Of one token's product: as it is, of integers, or act(gate) * up behind a norm, where `rows`
    are those of gate and up together."""


def random_weight(problem: Problem, copies: int = 1) -> list[Weight]:
    """`copies` random weights of the problem, in the CUDA layout, on the GPU; of the gated kind
    their bytes are those of gate, then up.
    """
    rows, columns = problem.rows, problem.columns
    most = CODE_MAX[problem.planes]
    groups = group_count(columns, problem.group_size)
    multiplier = None
    if groups:
        multiplier = torch.randint(
            1, 127 // most + 1, (rows, groups), dtype=torch.uint8, device="cuda"
        )
    quantized = Quantized(
        codes=torch.randint(-most, most + 1, (rows, columns), dtype=torch.int8, device="cuda"),
        scale=torch.rand(rows, device="cuda") * 0.01 + 0.001,
        multiplier=multiplier,
        group_size=problem.group_size,
        planes=problem.planes,
    )
    packed = pack(quantized, "cuda")
    return [
        Weight(
            bytes=packed.weight.view(torch.int8).clone(),
            scale=packed.scale.clone(),
            multiplier=None if packed.multiplier is None else packed.multiplier.clone(),
            rows=rows,
            columns=columns,
            group_size=problem.group_size,
            layout=packed.layout,
            stable=True,
        )
        for _ in range(copies)
    ]


def configurations(problem: Problem, tokens: int) -> list[GemmConfig | GemvConfig]:
    """What is worth trying for this many tokens."""
    if tokens == 1:
        chunk_bytes = 64 * problem.planes if problem.planes < 3 else 160
        row_words = launch.power_of_two(-(-problem.columns // 256)) * chunk_bytes // 4
        return [c for c in linear_gemv.SPACE if 8 <= c.rows * row_words / (32 * c.warps) <= 192]
    chunks = -(-problem.columns // 256)

    def worth(config: GemmConfig) -> bool:
        tiles = -(-problem.rows // config.rows) * -(-tokens // config.tokens)
        waste = -(-tokens // config.tokens) * config.tokens / tokens
        full = waste <= 2 or config.tokens <= 16
        few = tiles <= 600 or bool(config.resident)
        split = config.split == 1 or (few and chunks >= 2 * config.split)
        large = tokens <= 512 or config.tokens >= 128 or config.rows * config.tokens >= 8192
        if config.group_sums and not problem.group_size:
            return False
        return full and split and large and -(-tokens // config.tokens) <= 2 + tokens // 32

    return [config for config in gemm_config.SPACE if worth(config)]


def run(
    weight: Weight, x: torch.Tensor, config: GemmConfig | GemvConfig, sx: torch.Tensor | None,
    gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """One call with 8-bit activations; with sx, x holds integers."""
    rows = weight.rows // 2 if gated else weight.rows
    y = torch.empty((x.shape[0], rows), dtype=torch.bfloat16, device=x.device)
    if gated:
        assert isinstance(config, GemvConfig)
        norm = Norm("rms", 1e-5, x[0], round_first=True)
        product = Product(halves(weight), None, (y,))
        linear_gemv.linear_gemv(x, None, product, config, norm, "silu")
        return y
    product = Product((weight,), None, (y,))
    if isinstance(config, GemvConfig):
        linear_gemv.linear_gemv(x, sx, product, config)
    else:
        linear_gemm.linear_gemm(linear_gemm.quantize(x, product, 8, config), product, config)
    return y


def halves(weight: Weight) -> tuple[Weight, Weight]:
    """Gate and up of a weight with the rows of both."""
    rows = weight.rows // 2
    first, second = (
        dataclasses.replace(
            weight,
            bytes=weight.bytes[part],
            scale=weight.scale[part],
            multiplier=None if weight.multiplier is None else weight.multiplier[part],
            rows=rows,
        )
        for part in (slice(0, rows), slice(rows, 2 * rows))
    )
    return first, second


def random_input(problem: Problem, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [M, K] bf16, or for one token's integers q int8 and its scale."""
    shape = (tokens, problem.columns)
    if problem.kind != select.INTEGERS:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16), None
    q = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
    return q, torch.rand(tokens, device="cuda")


def measure(
    weights: list[Weight],
    given: tuple[torch.Tensor, torch.Tensor | None],
    config: GemmConfig | GemvConfig,
    budget_ms: float,
    gated: bool,
) -> float | None:
    """Microseconds a call; None where the configuration needs more than the GPU has."""
    from triton.runtime.errors import OutOfResources

    x, sx = given
    calls = [lambda w=w: run(w, x, config, sx, gated) for w in weights]
    try:
        return timing.graph_time(calls, budget_ms)
    except OutOfResources:
        return None


def compile_one(problem: Problem, tokens: int, config: GemmConfig | GemvConfig) -> str | None:
    """Run once, in a process of its own: fills Triton's cache. Returns the error, if any."""
    try:
        x, sx = random_input(problem, tokens)
        run(random_weight(problem)[0], x, config, sx, problem.kind == select.GATED)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def compile_all(problems: list[Problem], token_counts: list[int], processes: int) -> None:
    """Every kernel that `tune` will time, compiled in parallel."""
    jobs: dict[tuple[Any, ...], tuple[Problem, int, GemmConfig | GemvConfig]] = {}
    for problem in problems:
        for tokens in token_counts:
            for config in configurations(problem, tokens):
                kind = (problem.planes, problem.group_size, problem.kind)
                # The one-token kernel is compiled for a K, and its rows say whether programs walk
                # over blocks; the other serves any shape.
                small = dataclasses.replace(problem, rows=1024)
                given, shape = (small, None) if tokens > 1 else (problem, problem)
                many = tokens > linear_gemm.FEW_TOKENS
                rows = min(tokens, linear_gemm.FEW_TOKENS + 1 if many else 48)
                jobs.setdefault((config, kind, shape, many), (given, rows, config))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for error in pool.map(compile_one, *zip(*jobs.values(), strict=True)):
            if error:
                print("not usable:", error[:160], file=sys.stderr)


def tune(problem: Problem, token_counts: list[int]) -> dict[str, tuple]:
    """Key of the table -> fastest configuration, where it beats the one in use."""
    found = {}
    weight_bytes = random_weight(problem)[0].bytes.numel()
    for tokens in token_counts:
        copies = timing.rotation(ROTATED_BYTES, weight_bytes)
        weights = random_weight(problem, copies if tokens <= 512 else min(copies, 4))
        given = random_input(problem, tokens)
        times = {}
        gated = problem.kind == select.GATED
        for config in configurations(problem, tokens):
            us = measure(weights, given, config, 8.0, gated)
            if us is not None:
                times[config] = us
        order = sorted(times, key=times.__getitem__)
        line = " ".join(f"{dataclasses.astuple(c)}={times[c]:.2f}" for c in order[:4])
        name = f"{problem.columns}->{problem.rows} p{problem.planes} g{problem.group_size}"
        print(f"{name} {problem.kind if tokens == 1 else ''} M={tokens}: {line}", flush=True)
        now: GemmConfig | GemvConfig
        device = weights[0].bytes.device
        if tokens == 1:
            kernel = problem.kind
            now = select.gemv_config(weights[0], device, kernel)
        else:
            kernel = f"gemm {tokens}"
            now = select.gemm_config(weights[0], tokens, device)
        by_now = times.get(now) or measure(weights, given, now, 8.0, gated) or float("inf")
        if by_now > MARGIN * times[order[0]]:
            found[select.table_key(kernel, weights[0])] = dataclasses.astuple(order[0])
        print(f"    now {dataclasses.astuple(now)} {by_now:.2f}", flush=True)
        del weights
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", required=True, help="in_features x out_features")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, *select.BUCKETS])
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=0)
    kinds = (select.GEMV, select.INTEGERS, select.GATED)
    parser.add_argument("--kind", choices=kinds, default=select.GEMV, help="of one token's product")
    parser.add_argument("--out", type=Path, help="default: the table that this GPU reads")
    args = parser.parse_args()
    problems = []
    for shape in args.shapes:
        columns, rows = map(int, shape.split("x"))
        problem = Problem(columns, rows, args.planes, args.group_size, args.kind)
        problems.append(problem)
    if args.kind != select.GEMV:
        args.tokens = [1]
    compile_all(problems, args.tokens, os.cpu_count() or 1)
    name = torch.cuda.get_device_name()
    path = args.out or select.table_path(name)
    table = json.loads(path.read_text()) if path.is_file() else {"configurations": {}}
    table |= {"device": name, "torch": torch.__version__}
    table |= {"capability": launch.capability(0), "processors": launch.processors(0)}
    for problem in problems:
        table["configurations"] |= tune(problem, args.tokens)
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table["configurations"].items()]
        head = {key: value for key, value in table.items() if key != "configurations"}
        text = json.dumps(head)[:-1] + ', "configurations": {\n' + ",\n".join(lines) + "\n}}\n"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
