"""Whole decoder models of random ternary weights on a GPU: decode and prefill beside bf16.

python benchmarks/bench_model_cuda.py --device cuda --models 2b --ways ternc bf16

ternc: `ternc.quantize` (the head stays bf16, or is int8), then
`torch.compile(model, backend="ternc", mode="reduce-overhead")`.
bf16: the same model under Inductor in the same mode, and eager. Batch 1, static KV cache, greedy.
A token's floor is one read of all weights and of the filled cache; that of a prompt is its
products at the tensor cores' peak.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tabulate
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import attention  # noqa: E402
import common  # noqa: E402

import ternc  # noqa: E402
from ternc.backend import ternc_backend  # noqa: E402
from ternc.modules.linear import TernaryLinear  # noqa: E402

READ_BYTES_US = 3.15e6
PEAK_OPS_US = {"ternc": 1979e6, "bf16": 989e6}
"""Of one H100: read speed, dense tensor-core peaks of int8 and bf16."""
CONTEXT, POSITION = 512, 300
"""Places in the KV cache, and those filled before the first token that is timed."""

ROUNDS = 5
"""Medians are of as many."""
WARM_PROMPTS = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 128_256

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SHAPES = {"2b": Shape(2560, 30, 6912, 20, 5), "8b": Shape(4096, 32, 14336, 32, 8)}
"""BitNet b1.58 2B4T's, and that of an 8-billion-parameter decoder with grouped queries."""


def ternary(rows: int, columns: int) -> nn.Linear:
    """A Linear of random ternary values, made where it stays."""
    layer = nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(-1, 2, (rows, columns), device="cuda", dtype=torch.int8)
    with torch.no_grad():
        layer.weight.copy_(codes * (1.2 * columns**-0.5))
    return layer.requires_grad_(False)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [..., tokens, head width]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        gain = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        self.weight = nn.Parameter(gain, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * values.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        narrow = shape.kv_heads * shape.head_width
        self.q_proj = ternary(shape.width, shape.width)
        self.k_proj, self.v_proj = ternary(narrow, shape.width), ternary(narrow, shape.width)
        self.o_proj = ternary(shape.width, shape.width)
        size = (1, shape.kv_heads, CONTEXT, shape.head_width)
        for name in ("keys", "values"):
            cache = torch.randn(size, device="cuda", dtype=torch.bfloat16)
            self.register_buffer(name, cache, persistent=False)
        arrived = torch.zeros(shape.kv_heads, device="cuda", dtype=torch.int32)
        self.register_buffer("arrived", arrived, persistent=False)

    def forward(
        self, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """cos, sin: of one token the table of every place in the cache, else a row a token."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if x.shape[1] == 1:
            cache = (self.keys, self.values, self.arrived)
            mixed = attention.token_attention(q, k, v, cos, sin, position, *cache)
        else:
            mixed = self.of_prompt(q, k, v, cos, sin)
        return self.o_proj(mixed)

    def of_prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *places: torch.Tensor):
        tokens = q.shape[1]
        q, k, v = (
            projected.view(1, tokens, heads, -1).transpose(1, 2)
            for projected, heads in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        q, k = turned(q, *places), turned(k, *places)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(1, tokens, -1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = Norm(shape.width), Norm(shape.width)
        self.attention = Attention(shape)
        self.gate_proj = ternary(shape.hidden, shape.width)
        self.up_proj = ternary(shape.hidden, shape.width)
        self.down_proj = ternary(shape.width, shape.hidden)

    def forward(self, x: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), *places)
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Decoder(nn.Module):
    """Tokens [1, T] at `position` [T] -> the next token [1, 1]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(
            shape.vocabulary, shape.width, device="cuda", dtype=torch.bfloat16
        )
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.lm_head = nn.Linear(
            shape.width, shape.vocabulary, bias=False, device="cuda", dtype=torch.bfloat16
        )
        powers = torch.arange(0, shape.head_width, 2, device="cuda") / shape.head_width
        self.register_buffer("frequencies", 500_000.0**-powers, persistent=False)
        places = torch.arange(CONTEXT, device="cuda")[:, None] * self.frequencies
        self.register_buffer("cos", places.cos(), persistent=False)
        self.register_buffer("sin", places.sin(), persistent=False)
        self.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x, cos, sin = self.embedding(tokens), self.cos, self.sin
        if tokens.shape[1] > 1:
            angles = position[:, None].float() * self.frequencies
            cos, sin = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, position, cos, sin)
        return attention.best_token(self.lm_head(self.norm(x[:, -1:])))


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def decode(step: Step, tokens: int) -> float:
    """Seconds a token, each fed with the one before; nothing is read on the host."""
    token = torch.full((1, 1), 17, device="cuda")
    position = torch.full((1,), POSITION, device="cuda")

    def run(count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token.copy_(step(token, position))
            position.add_(1)

    run(4)
    position.fill_(POSITION)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(tokens)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


def prefill(step: Step, prompt: int, repeats: int) -> float:
    """Seconds for a prompt."""
    tokens = torch.randint(0, 1000, (1, prompt), device="cuda")
    position = torch.arange(prompt, device="cuda")
    for _ in range(WARM_PROMPTS):
        torch.compiler.cudagraph_mark_step_begin()
        step(tokens, position)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        torch.compiler.cudagraph_mark_step_begin()
        step(tokens, position)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def kernels_of(step: Step, tokens: torch.Tensor, position: torch.Tensor) -> list[list[Any]]:
    """[name, launches, microseconds] of what one step runs on the GPU, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.compiler.cudagraph_mark_step_begin()
        step(tokens, position)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    order = sorted(found, key=lambda name: -sum(found[name]))
    return [[name[:100], len(found[name]), round(sum(found[name]), 1)] for name in order]


def kernels_of_a_token(step: Step) -> list[list[Any]]:
    token = torch.full((1, 1), 17, device="cuda")
    return kernels_of(step, token, torch.full((1,), POSITION, device="cuda"))


def kernels_of_a_prompt(step: Step, prompt: int) -> list[list[Any]]:
    tokens = torch.randint(0, 1000, (1, prompt), device="cuda")
    return kernels_of(step, tokens, torch.arange(prompt, device="cuda"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes that every token reads: all weights but the embedding's."""
    count = 0
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            count += module.packed.nbytes
        elif isinstance(module, nn.Linear):
            count += module.weight.nbytes
    return count


def prompt_row(
    step: Step, way: str, args: argparse.Namespace, shape: Shape
) -> dict[str, float | list[list[Any]]]:
    """What a prompt takes, and its floor."""
    seconds = statistics.median(prefill(step, args.prompt, args.repeats) for _ in range(ROUNDS))
    narrow = shape.kv_heads * shape.head_width
    weights = shape.width * (2 * shape.width + 2 * narrow + 3 * shape.hidden)
    work = 2 * weights * shape.layers * args.prompt
    floor = work / PEAK_OPS_US[way.split()[0].strip(",")]
    kernels = kernels_of_a_prompt(step, args.prompt)
    times = {"prefill ms": seconds * 1e3, "prefill floor ms": floor / 1e3}
    return times | {"prompt kernels": kernels}


def measure(model: nn.Module, way: str, args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    compiled: Step = model
    start = time.perf_counter()
    if way.startswith("ternc"):
        compiled = torch.compile(
            model, backend=ternc_backend, mode="reduce-overhead", dynamic=False
        )
    elif way == "bf16 inductor":
        compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    row: dict[str, Any] = {"way": way}
    cache = 4 * shape.layers * shape.kv_heads * shape.head_width * POSITION
    row["floor us"] = (weight_bytes(model) + cache) / READ_BYTES_US
    with common.turn(args.lock, alone=False):
        decode(compiled, 1)
        if args.prompt:
            prefill(compiled, args.prompt, 1)
    with common.turn(args.lock, alone=True):
        seconds = statistics.median(decode(compiled, args.tokens) for _ in range(ROUNDS))
        row |= {"us a token": seconds * 1e6, "tokens/s": 1 / seconds}
        row["kernels"] = kernels_of_a_token(compiled)
        row["launches a token"] = sum(count for _, count, _ in row["kernels"])
        row["GPU us a token"] = sum(us for *_, us in row["kernels"])
        if args.prompt:
            row |= prompt_row(compiled, way, args, shape)
    print(json.dumps(row), flush=True)
    row["compile and run s"] = time.perf_counter() - start
    torch.compiler.reset()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["2b"], choices=list(SHAPES))
    ways = ["bf16 eager", "bf16 inductor", "ternc", "ternc, int8 head"]
    parser.add_argument("--ways", nargs="+", default=["bf16 inductor", "ternc"], choices=ways)
    parser.add_argument("--tokens", type=int, default=64, help="decoded and timed")
    parser.add_argument("--prompt", type=int, default=2048, help="0: no prefill")
    parser.add_argument("--repeats", type=int, default=4, help="of the prefill")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--lock", help="file: compile beside other processes, time alone")
    parser.add_argument("--commit", help="where the tree has no git folder")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.device != "cuda":
        print("bench_model_cuda.py measures GPUs: --device cuda")
        return
    rows = []
    for name in args.models:
        shape = SHAPES[name]
        if args.layers:
            shape = dataclasses.replace(shape, layers=args.layers)
        torch.manual_seed(0)
        with torch.no_grad():
            model = Decoder(shape).eval()
            for way in args.ways:
                if way.startswith("ternc"):
                    start = time.perf_counter()
                    heads = ("lm_head",) if "head" in way else ()
                    model = ternc.quantize(model, ternc.Config(int8=heads), inplace=True)
                    torch.cuda.synchronize()
                    print(f"quantize {time.perf_counter() - start:.1f} s", flush=True)
                row = {"model": name} | measure(model, way, args, shape)
                rows.append(row)
                if args.json:
                    facts = {
                        "commit": args.commit or common.commit(),
                        "gpu": torch.cuda.get_device_name(),
                        "torch": torch.__version__,
                        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    }
                    Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}))
            del model
        gc.collect()
        torch.cuda.empty_cache()
    shown = [{k: v for k, v in row.items() if "kernels" not in k} for row in rows]
    print(tabulate.tabulate(shown, headers="keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
