"""One way to run one decoder, in a process of its own: answers `bench_model.py` line by line.

build, compile -> {"ready": ...}; then "decode", "prefill", "outside", "quit" on stdin, one JSON
object a line on stdout. Batch 1. Decode: one token with a static cache; prefill: a prompt
without a cache, logits of its last token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import cycles  # noqa: E402
import decoders  # noqa: E402
import torch  # noqa: E402

CACHE = 256
"""Places of the static cache."""
STEPS = 12
"""Tokens of a sample of decode."""
COMPARED = 4096
"""Logits of a prompt's last token that are compared between the ways."""
COSINE = 0.9
"""Least agreement of a row's logits with what they are compared with; below, it is no row."""
SAMPLED = 300
"""Tokens whose cycles are sampled."""
INT8 = ("lm_head", "*.wte", "*.embed_tokens")


class Runner:
    """A model and how it is compiled: `way` is a key of WAYS. `threads`: all but the building's,
    which are those of the process.
    """

    def __init__(
        self, shape: str, way: str, prompt: int, packed: Path | None, threads: int
    ) -> None:
        dtype, ternary, backend, options = WAYS[way]
        start = time.perf_counter()
        with torch.device("meta"):
            self.sizes = decoders.product_sizes(decoders.SHAPES[shape]())
        self.read_bytes = sum(self.sizes) * dtype.itemsize
        self.bits = 8.0 * dtype.itemsize
        if way in PACKED:
            self._pack(shape, packed / shape if packed else None)
        else:
            self.model = decoders.build(shape, dtype, ternary)
        self.built = time.perf_counter() - start
        torch.set_num_threads(threads)
        self.ids = torch.tensor([decoders.prompt(prompt)])
        self.used = CACHE
        start = time.perf_counter()
        from ternc.export import TokenStep

        token = TokenStep(self.model, CACHE)
        self.cache = token.cache
        compiled = _ahead if backend == AHEAD else _compiled
        self.step = compiled(token, (self.ids[:, :1], torch.tensor([[0]])), backend, options)
        self.prompt = compiled(Prompt(self.model), (self.ids,), backend, options)
        self.compiled = time.perf_counter() - start

    def _pack(self, shape: str, folder: Path | None) -> None:
        """Quantises, or loads what an earlier process has quantised and saved."""
        import ternc

        if folder and folder.is_dir():
            self.model = ternc.load(folder)
        else:
            model = decoders.build(shape, torch.bfloat16, ternary=True)
            config = ternc.Config(int8=INT8)
            self.model = ternc.quantize(model, config, inplace=True, progress=False).float()
            if folder:
                ternc.save(self.model, folder)
        report = ternc.report(self.model)
        rows = [row for row in report.rewritten if row.pattern != "embedding"]
        self.read_bytes = sum(row.bytes_after for row in rows)
        assert report.totals is not None
        self.bits = report.totals.bits_per_weight

    def token(self) -> float:
        """Seconds of one token."""
        if self.used >= CACHE - 1:
            self.cache.reset()
            self.used = 0
        position = torch.tensor([[self.used]])
        self.used += 1
        start = time.perf_counter()
        self.step(self.ids[:, :1], position)
        return time.perf_counter() - start

    def decode(self) -> dict[str, Any]:
        return {"seconds": [self.token() for _ in range(STEPS)]}

    def prefill(self) -> dict[str, Any]:
        start = time.perf_counter()
        logits = self.prompt(self.ids)
        seconds = time.perf_counter() - start
        self.logits = logits[0, -1, :COMPARED].tolist()
        return {"seconds": [seconds]}

    def outside(self) -> dict[str, Any]:
        """Share of the cycles of tokens by class: cycles.CLASSES."""
        return {"cycles": cycles.sampled(lambda: [self.token() for _ in range(SAMPLED)])}


class Prompt(torch.nn.Module):
    """The logits of the last token of a prompt."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def _compiled(module: Any, inputs: Any, backend: str | None, options: Any) -> Callable[..., Any]:
    if backend is None:
        return module
    compiled: Any = torch.compile(module, backend=backend, options=dict(options), dynamic=False)
    return compiled


def _ahead(module: Any, inputs: Any, backend: str | None, options: Any) -> Callable[..., Any]:
    from ternc.export import compile_step

    with tempfile.TemporaryDirectory() as folder:
        return compile_step(module, inputs, Path(folder) / "step.pt2")


AHEAD = "ternc.export.compile_step"
DEFAULT = "ternc, default on a float model"
_FP32, _BF16 = torch.float32, torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, bool, str | None, dict[str, Any]]] = {
    "eager fp32": (_FP32, False, None, {}),
    "eager bf16": (_BF16, True, None, {}),
    "Inductor fp32": (_FP32, False, "inductor", {}),
    "Inductor bf16": (_BF16, True, "inductor", {}),
    "Inductor bf16, cpp_wrapper, no module guards": (
        _BF16,
        True,
        "inductor",
        {
            "cpp_wrapper": True,
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    ),
    "ternc": (_BF16, True, "ternc", {}),
    "ternc, cpp_wrapper": (_BF16, True, "ternc", {"inductor": {"cpp_wrapper": True}}),
    "ternc, cpp_wrapper, no module guards": (
        _BF16,
        True,
        "ternc",
        {
            "inductor": {"cpp_wrapper": True},
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    ),
    "ternc, ahead of time": (_BF16, True, AHEAD, {}),
    DEFAULT: (_FP32, False, "ternc", {}),
}
"""Name -> dtype it is built in, weights ternary by value, backend, options."""
PACKED = (
    "ternc",
    "ternc, cpp_wrapper",
    "ternc, cpp_wrapper, no module guards",
    "ternc, ahead of time",
)
"""`ternc.quantize`d before they are compiled, head and embedding as int8, floats in fp32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=decoders.SHAPES)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--packed", type=Path)
    options = parser.parse_args()
    with torch.inference_mode(), answers() as answer:
        runner = Runner(options.shape, options.way, options.prompt, options.packed, options.threads)
        first = {"before": runner.compiled}
        for work in ("decode", "prefill"):
            start = time.perf_counter()
            getattr(runner, work)()
            first[work] = time.perf_counter() - start
        facts = {"built": runner.built, "first": first, "read_bytes": runner.read_bytes}
        facts |= {"bits": runner.bits, "sizes": runner.sizes, "logits": runner.logits}
        serve(runner, facts, answer)


@contextlib.contextmanager
def answers() -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes an answer to stdout, where nothing else is written: prints go to stderr."""
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        yield lambda found: print(json.dumps(found), file=stdout, flush=True)


def serve(runner: Any, facts: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """The facts, then the answer of the method that each line of stdin names."""
    answer({"ready": facts})
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        answer(getattr(runner, line.strip())())


if __name__ == "__main__":
    main()
