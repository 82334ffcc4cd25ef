"""A decode step of GPT-2's shape: the share of it outside of kernels and attention, way by way.

    python benchmarks/bench_overhead.py --threads 1 --rounds 5 --output benchmarks/results/x

Two forms of one shape, transformers' own class and plain modules, in every way that a user can
take to run a packed step. Each pair is a process of its own; they take turns in every round.
`--output` names files without their suffix: .json, .md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402
import cycles  # noqa: E402
import decoders  # noqa: E402
from bench_model import Way, alone, started  # noqa: E402
from model_child import CACHE, INT8, SAMPLED, answers, serve  # noqa: E402
from plain_decoder import PlainDecoder  # noqa: E402

import ternc  # noqa: E402
from ternc.export import TokenStep, compile_step  # noqa: E402
from ternc.runtime import ops  # noqa: E402

FORMS = ("transformers", "modules")
STEPS = 50
"""Tokens of a sample of time."""
LONGEST = 4.0
"""Seconds of a sample of cycles, at most."""
_CALLS = {"inductor": {"cpp_wrapper": True}}
WAYS: dict[str, dict[str, Any]] = {
    "compiled, Python calls": {},
    "compiled": _CALLS,
    "compiled, no module guards": {
        **_CALLS,
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    },
    "compiled, no guards": {
        **_CALLS,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    },
    "compiled, guards skipped after warm-up": _CALLS,
    "ahead of time": {},
}
"""Name -> options of torch.compile; C++ calls (`cpp_wrapper`) but in the first."""
SKIPPED = "compiled, guards skipped after warm-up"
AHEAD = "ahead of time"


class Runner:
    """One form of the shape, run in one way."""

    def __init__(self, form: str, way: str, folder: Path) -> None:
        module = transformers_step(folder) if form == "transformers" else plain_step()
        self.two_dimensions = form == "transformers"
        self.ids, self.used = torch.tensor([[17]]), 0
        start = time.perf_counter()
        self.stance: Callable[[], Any] = contextlib.nullcontext
        self.step: Callable[..., torch.Tensor]
        if way == AHEAD:
            with tempfile.TemporaryDirectory() as code:
                file = Path(code) / "step.pt2"
                self.step = compile_step(module, (self.ids, self.position()), file)
        else:
            self.step = torch.compile(module, backend="ternc", options=WAYS[way], dynamic=False)
        if way == SKIPPED:
            self.stance = lambda: torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        self.tokens(1)
        self.compiled = time.perf_counter() - start
        self.module = module
        with self.stance():
            self.tokens(STEPS)

    def position(self) -> torch.Tensor:
        return torch.tensor([[self.used]] if self.two_dimensions else [self.used])

    def tokens(self, count: int) -> None:
        end = time.perf_counter() + LONGEST
        for _ in range(count):
            if time.perf_counter() > end:
                break
            if self.used == CACHE:
                self.used = 0
                if self.two_dimensions:
                    self.module.cache.reset()
            self.step(self.ids, self.position())
            self.used += 1

    def decode(self) -> dict[str, Any]:
        with self.stance():
            seconds = []
            for _ in range(STEPS):
                start = time.perf_counter()
                self.tokens(1)
                seconds.append(time.perf_counter() - start)
            return {"seconds": statistics.median(seconds), "best": min(seconds)}

    def outside(self) -> dict[str, Any]:
        with self.stance():
            return {"cycles": cycles.sampled(lambda: self.tokens(SAMPLED))}


def transformers_step(folder: Path) -> nn.Module:
    if folder.is_dir():
        return TokenStep(ternc.load(folder), CACHE)
    model = ternc.quantize(
        decoders.build("gpt2-small", torch.float32, ternary=True),
        ternc.Config(int8=INT8),
        inplace=True,
        progress=False,
    )
    return TokenStep(model, CACHE)


def plain_step() -> nn.Module:
    torch.manual_seed(0)
    model = decoders.fill(PlainDecoder(CACHE), ternary=True)
    config = ternc.Config(int8=("lm_head", "wte"))
    return ternc.quantize(model, config, inplace=True, progress=False)


def child(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    with torch.inference_mode(), answers() as answer:
        runner = Runner(options.form, options.way, options.packed)
        serve(runner, {"compile s": runner.compiled}, answer)


def launch(form: str, way: str, options: argparse.Namespace) -> Way:
    command = [sys.executable, __file__, "--form", form, "--way", way]
    command += ["--threads", str(options.threads), "--packed", str(options.packed)]
    return started(f"{form}, {way}", command, options.verbose)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every pair of form and way, after rounds in which each is sampled once."""
    pairs = [(form, way) for form in options.forms for way in options.ways]
    children = []
    for form, way in pairs:
        children.append(launch(form, way, options))
        children[-1].wait(1e6)
    rows: list[dict[str, Any]] = [
        {"form": form, "way": way, "missing": each.missing, "rounds": [], **each.facts}
        for (form, way), each in zip(pairs, children, strict=True)
    ]
    for _ in range(options.rounds):
        for row, each in zip(rows, children, strict=True):
            with alone(options.lock):
                if not each.missing:
                    row["rounds"].append(each.ask("decode") | each.ask("outside"))
    for each in children:
        with contextlib.suppress(BrokenPipeError):
            assert each.process is not None
            each.process.communicate("quit\n")
    return rows


COLUMNS = ("form", "way", "outside %", "least", "guards and Python", "calls", "kernels",
           "attention", "waiting %", "us a token", "best us", "compile s")  # fmt: skip
NOTES = f"""
Shares of the main thread's cycles by hardware counters (`cycles.py`), {SAMPLED} tokens a sample
or {LONGEST:.0f} s, medians of the rounds; of what is not waiting for threads. `least`: the round
with the least outside. `waiting`: cycles in OpenMP's library, of all. Time: median of {STEPS}
tokens.
"""


def described(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of one row."""
    sampled = [r["cycles"] for r in row["rounds"] if r.get("cycles")]
    if not sampled:
        return {"form": row["form"], "way": row["way"]}
    busy = [1.0 - found.get(cycles.WAITING, 0.0) for found in sampled]

    def median(name: str) -> float:
        found = [f.get(name, 0.0) / b for f, b in zip(sampled, busy, strict=True)]
        return 100 * statistics.median(found)

    outside = [100 * cycles.outside(found) for found in sampled]
    names = (*cycles.OUTSIDE, *(name for name, _ in cycles.CLASSES))
    return {
        "form": row["form"],
        "way": row["way"],
        "outside %": statistics.median(outside),
        "least": min(outside),
        **{name: median(name) for name in names},
        "waiting %": 100 * (1 - statistics.median(busy)),
        "us a token": 1e6 * statistics.median(r["seconds"] for r in row["rounds"]),
        "best us": 1e6 * min(r["best"] for r in row["rounds"]),
        "compile s": row["compile s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packed", type=Path, default=Path("-"), help="a packed GPT-2 folder")
    parser.add_argument("--machine", default="", help="a remark for the record, such as `shared`")
    parser.add_argument("--output", type=Path, help="files of the result, without suffix")
    parser.add_argument("--lock", type=Path, help="file to lock while sampling")
    parser.add_argument("--verbose", action="store_true", help="show what the children print")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        child(options)
        return
    ops.register()
    facts = common.machine(options.threads)
    if options.machine:
        facts["remark"] = options.machine
    rows = measure(options)
    cells = [[described(row).get(column, "") for column in COLUMNS] for row in rows]
    table = tabulate.tabulate(cells, COLUMNS, tablefmt="github", floatfmt=".1f")
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    text = f"# A decode step of GPT-2's shape\n\n{listed}\n\n{table}\n{NOTES}"
    if options.output:
        common.write(rows, facts, f"{options.output}.json")
        Path(f"{options.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
