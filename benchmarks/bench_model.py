"""Whole decoders on the CPU: ternc beside eager and Inductor, decode and prefill, tokens a second.

    python benchmarks/bench_model.py --shapes gpt2-small --rounds 5 --output benchmarks/results/x

Every way to run a shape is a process of its own (model_child.py), alive during the whole run; they
take turns, and the machine's limits are sampled in every round. A way whose process would not fit
memory is not run, and the table says so. `--output` names files without their suffix: .json, .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tabulate
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402
import decoders  # noqa: E402
from limits import Limits  # noqa: E402
from model_child import PACKED, STEPS, WAYS  # noqa: E402

from ternc.runtime import cpu, ops  # noqa: E402

PARAMETERS = {"gpt2-small": 0.163e9, "llama-1.1b": 1.1e9, "bitnet-2b4t": 2.41e9}
"""Elements that a process holds, for the memory it is going to need."""
HELD = {torch.float32: 1.25, torch.bfloat16: 1.4}
"""Peak over size of the weights; a packed model is built in bf16 and then shrinks."""
READ_BYTES = 64 << 20
OUTSIDE = 0.15
"""Most of a step of decode that may pass outside of kernels and attention."""


@dataclasses.dataclass
class Way:
    """One child process and what it has answered."""

    name: str
    process: subprocess.Popen[str] | None
    missing: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {"decode": [], "prefill": []}
    )
    outside: float | None = None

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to one line; a child that died answers nothing and is not asked again."""
        assert self.process is not None and self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the child; the first one comes unasked, when it has compiled."""
        assert self.process is not None and self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.missing = f"the process ended with status {self.process.wait()}"
        return {}


def start(shape: str, name: str, options: argparse.Namespace) -> Way:
    """Starts the child and waits until it has compiled, or says why there is none."""
    dtype = WAYS[name][0]
    need = PARAMETERS[shape] * dtype.itemsize * HELD[dtype]
    if need > (free := available_memory()):
        return Way(name, None, f"not run: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    script = str(Path(__file__).with_name("model_child.py"))
    command = [sys.executable, script, "--shape", shape, "--way", name]
    command += ["--threads", str(options.threads), "--prompt", str(options.prompt)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    errors = None if options.verbose else subprocess.DEVNULL
    process = subprocess.Popen(command, text=True, stderr=errors, **pipes)  # type: ignore
    way = Way(name, process)
    way.facts = way.answer().get("ready", {})
    print(f"{shape}, {name}: {way.missing or 'ready'}", file=sys.stderr, flush=True)
    return way


def available_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(shape: str, options: argparse.Namespace, limits: Limits) -> list[dict[str, Any]]:
    limits.clear()
    ways = [start(shape, name, options) for name in options.ways]
    with alone(options.lock):
        for _ in range(options.rounds):
            limits.sample(READ_BYTES)
            for way in ways:
                for work, found in way.seconds.items():
                    if not way.missing:
                        found.extend(way.ask(work).get("seconds", []))
        for way in ways:
            if "ternc" in way.name and not way.missing:
                way.outside = way.ask("outside").get("share")
    for way in ways:
        if way.process is not None:
            way.process.communicate("quit\n")
    return [*limit_rows(shape, ways, limits, options), *(row(shape, w, options) for w in ways)]


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Holds the lock of a file that the benchmarks of a machine share, if one is given."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
        yield


def limit_rows(
    shape: str, ways: list[Way], limits: Limits, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """What memory allows a token of the packed model, and the multiplier a prompt of it."""
    packed = next((way for way in ways if way.name in PACKED and way.facts), None)
    if packed is None or limits.read.best is None:
        return []
    layers, head = packed.facts["sizes"]
    tokens = {"shape": shape, "way": f"limit: read {limits.read.best / 1e9:.1f} GB/s"}
    tokens["decode best"] = limits.read.best / packed.facts["read_bytes"]
    rows = [tokens]
    if limits.multiply.best is not None:
        operations = 2 * (layers + head / options.prompt)
        rate = limits.multiply.best
        name = f"limit: {limits.unit} {rate / 1e12:.2f} TOP/s"
        rows.append({"shape": shape, "way": name, "prefill best": rate / operations})
    return rows


def row(shape: str, way: Way, options: argparse.Namespace) -> dict[str, Any]:
    if way.missing or not all(way.seconds.values()):
        return {"shape": shape, "way": way.name, "note": way.missing or "not run"}
    decode, prefill = way.seconds["decode"], way.seconds["prefill"]
    found: dict[str, Any] = {
        "shape": shape,
        "way": way.name,
        "decode median": 1 / statistics.median(decode),
        "decode best": 1 / min(decode),
        "prefill median": options.prompt / statistics.median(prefill),
        "prefill best": options.prompt / min(prefill),
        "bits/weight": way.facts["bits"],
    }
    if WAYS[way.name][2] is not None:
        found["compile s"] = sum(way.facts["first"].values())
    if way.outside is not None:
        found["outside %"] = 100 * way.outside
    return found


COLUMNS = ("shape", "way", "decode median", "decode best", "prefill median", "prefill best")
MORE = ("outside %", "bits/weight", "compile s", "note")
NOTES = f"""
Tokens a second, batch 1. Decode: one token, static cache of 256 places, {STEPS} tokens a sample.
Prefill: {{prompt}} tokens without a cache, logits of the last one. `ternc` rows: linear weights
ternary by value, head and embedding int8, floating point in fp32, packed by `ternc.quantize`.
`default on a float model`: Gaussian fp32 weights, `torch.compile(model, backend="ternc")` with
nothing set; head and embedding stay fp32, and so do layers that three planes do not reach.
`outside %`: share of a profiled decode step that is not in ternc ops, attention or Inductor's
loops, the profiler's own time included (the goal is at most {100 * OUTSIDE:.0f} %).
`no module guards`:
`torch.compiler.skip_guard_on_all_nn_modules_unsafe`, which is the user's to choose. `bits/weight`:
the whole model for packed rows. Limits: best samples of the same rounds. llama.cpp: not run.
"""


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any], prompt: int) -> str:
    cells = [[entry.get(column, "") for column in (*COLUMNS, *MORE)] for entry in rows]
    table = tabulate.tabulate(cells, (*COLUMNS, *MORE), tablefmt="github", floatfmt=".1f")
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return f"# Whole models on the CPU\n\n{listed}\n\n{table}\n{NOTES.format(prompt=prompt)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=decoders.SHAPES, default=["gpt2-small"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", default="", help="a remark for the record, such as `shared`")
    parser.add_argument("--output", type=Path, help="files of the result, without suffix")
    parser.add_argument("--lock", type=Path, help="file to lock while sampling")
    parser.add_argument("--verbose", action="store_true", help="show what the children print")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ops.register()
    limits = Limits(options.threads, cpu.isa() or "")
    facts = common.machine(options.threads)
    if options.machine:
        facts["remark"] = options.machine
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        rows += measure(shape, options, limits)
        text = markdown(rows, facts, options.prompt)
        if options.output:
            found = {"machine": facts, "rows": rows}
            Path(f"{options.output}.json").write_text(json.dumps(found, indent=1) + "\n")
            Path(f"{options.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
