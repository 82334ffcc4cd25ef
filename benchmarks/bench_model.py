"""Whole decoders on the CPU beside eager torch, Inductor and llama.cpp: tokens a second.

    python benchmarks/bench_model.py --shapes gpt2-small --rounds 5 --output benchmarks/results/x

Every way to run a shape is a process of its own (model_child.py, llama_child.py). As many as fit
memory are alive together and take turns, with the machine's limits sampled in every round; the
next group follows. `--output` names files without their suffix: .json, .md; `--gguf` the folder of
gguf_models.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tabulate
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common  # noqa: E402
import cycles  # noqa: E402
import decoders  # noqa: E402
import gguf_models  # noqa: E402
import llama_child  # noqa: E402
from limits import Limits, place  # noqa: E402
from model_child import COSINE, DEFAULT, PACKED, STEPS, WAYS  # noqa: E402

from ternc.runtime import cpu, ops  # noqa: E402

PARAMETERS = {"gpt2-small": 0.163e9, "llama-1.1b": 1.1e9, "bitnet-2b4t": 2.41e9}
"""Elements that a process holds, for the memory it is going to need."""
HELD = {torch.float32: 1.25, torch.bfloat16: 1.6}
"""Peak over size of the weights; a packed model is built in bf16 and then shrinks."""
HELD_BESIDE = 0.35
"""More of it where the compiled model holds planes beside the weights they were fitted to."""
LOSSY_COSINE = 0.5
"""Least agreement of weights that three planes approach: an error of each of up to 30 layers."""
READ_BYTES = 64 << 20
RUNTIME_BYTES = 0.5e9
"""What a process holds beside its weights."""
LONG = 4.0
"""Seconds of a sample after which the work is not sampled again."""
LATE = "not run: the time was up"
NAMES = (*WAYS, *llama_child.WAYS)
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
    slow: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {"decode": [], "prefill": []}
    )
    """Those in the slow state of the tile unit; they count only where there are no others."""
    cycles: dict[str, float] | None = None
    group: int = 0
    cosine: float | None = None

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to one line; a child that died answers nothing and is not asked again."""
        assert self.process is not None and self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        return self.answer()

    def wait(self, seconds: float) -> None:
        """Until the child has compiled and sent its first line, unasked; it ends if it is late."""
        assert self.process is not None and self.process.stdout
        if select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            self.facts = self.answer().get("ready", {})
            return
        self.process.kill()
        self.missing = LATE

    def samples(self, work: str) -> list[float]:
        return self.seconds[work] or self.slow[work]

    def answer(self) -> dict[str, Any]:
        """The next line of the child."""
        assert self.process is not None and self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.missing = f"the process ended with status {self.process.wait()}"
        return {}


def needed(shape: str, name: str, options: argparse.Namespace) -> float:
    """Bytes of the child at its peak."""
    if name in llama_child.WAYS:
        path = gguf_models.path_of(options.gguf, shape, llama_child.WAYS[name])
        return 2 * path.stat().st_size + RUNTIME_BYTES  # the file and its repacked weights
    if name in PACKED and options.packed and (options.packed / shape).is_dir():
        return PARAMETERS[shape] + RUNTIME_BYTES
    dtype = WAYS[name][0]
    held = HELD[dtype] + (HELD_BESIDE if name == DEFAULT else 0.0)
    return PARAMETERS[shape] * dtype.itemsize * held + RUNTIME_BYTES


def missing(shape: str, name: str, options: argparse.Namespace) -> str:
    """Why a way cannot run on this machine, if it cannot."""
    if time.perf_counter() > options.end:
        return LATE
    if name not in llama_child.WAYS:
        return ""
    if importlib.util.find_spec("llama_cpp") is None:
        return "not run: llama-cpp-python is not installed"
    path = options.gguf and gguf_models.path_of(options.gguf, shape, llama_child.WAYS[name])
    return "" if path and path.is_file() else "not run: no file of this shape in --gguf"


def launch(shape: str, name: str, options: argparse.Namespace) -> Way:
    """Starts the child, which builds and compiles before it says that it is ready."""
    llama = name in llama_child.WAYS
    script = Path(__file__).with_name("llama_child.py" if llama else "model_child.py")
    command = [sys.executable, str(script), "--shape", shape, "--way", name]
    command += ["--threads", str(options.threads), "--prompt", str(options.prompt)]
    if folder := options.gguf if llama else options.packed:
        command += ["--folder" if llama else "--packed", str(folder)]
    return started(name, command, options.verbose)


def started(name: str, command: list[str], verbose: bool) -> Way:
    """Starts a child that answers on its standard output."""
    errors = None if verbose else subprocess.DEVNULL
    pipe = subprocess.PIPE
    return Way(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True))


def start(shape: str, names: list[str], options: argparse.Namespace) -> list[Way]:
    """Starts the first of `names`, as many as fit memory, and takes them off the list."""
    ways: list[Way] = []
    starting: list[Way] = []

    def finish_one() -> None:
        way = starting.pop(0)
        way.wait(options.end - time.perf_counter())
        print(f"{shape}, {way.name}: {way.missing or 'ready'}", file=sys.stderr, flush=True)

    while names:
        name = names[0]
        while len(starting) == options.starts:
            finish_one()
        if why := missing(shape, name, options):
            ways.append(Way(names.pop(0), None, why))
            continue
        need = needed(shape, name, options)
        claimed = sum(needed(shape, way.name, options) for way in starting)
        while starting and need > available_memory() - claimed:
            finish_one()
            claimed = sum(needed(shape, way.name, options) for way in starting)
        if need > (free := available_memory()):
            if any(way.process for way in ways):
                break
            why = f"not run: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            ways.append(Way(names.pop(0), None, why))
            continue
        starting.append(launch(shape, names.pop(0), options))
        ways.append(starting[-1])
    while starting:
        finish_one()
    return ways


def available_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def measure(shape: str, options: argparse.Namespace, limits: Limits) -> list[dict[str, Any]]:
    """Rows of one shape, group by group."""
    limits.clear()
    names, ways = list(options.ways), []
    while names:
        group = start(shape, names, options)
        for way in group:
            way.group = len({w.group for w in ways if w.process}) + 1
        take_turns(group, limits, options)
        for way in group:
            if way.process is not None:
                with contextlib.suppress(BrokenPipeError):
                    way.process.communicate("quit\n")
        ways += group
    compare(ways)
    return [*limit_rows(shape, ways, limits, options), *(row(shape, w, options) for w in ways)]


def take_turns(ways: list[Way], limits: Limits, options: argparse.Namespace) -> None:
    """Samples of every way in every round, on the cores that the tile unit's state asks for."""
    for _ in range(options.rounds):
        with alone(options.lock):
            if time.perf_counter() > options.last:
                break
            limits.settle()
            limits.sample(READ_BYTES)
            for way in ways:
                for work in way.seconds:
                    if not way.missing and max(way.samples(work), default=0.0) < LONG:
                        sample(way, work, limits)
    limits.release()
    for way in ways:
        if "ternc" in way.name and not way.missing:
            with alone(options.lock):
                way.cycles = way.ask("outside").get("cycles")


def sample(way: Way, work: str, limits: Limits) -> None:
    assert way.process is not None
    if cores := limits.settle():
        place(way.process.pid, cores)
    fast = limits.tiles_are_fast()
    seconds = way.ask(work).get("seconds", [])
    fast = fast and limits.tiles_are_fast()
    (way.seconds if fast else way.slow)[work].extend(seconds)


def compare(ways: list[Way]) -> None:
    """Logits with those of the first row of the same weights; a row that is far off is no row.

    The default on a float model is compared last: others are not measured by what it loses.
    """
    first: dict[bool, torch.Tensor] = {}
    for way in sorted(ways, key=lambda way: way.name == DEFAULT):
        way.cosine = way.facts.get("cosine")
        if logits := way.facts.get("logits"):
            mine = torch.tensor(logits)
            reference = first.setdefault(WAYS[way.name][1], mine)
            way.cosine = float(torch.nn.functional.cosine_similarity(mine, reference, dim=0))
            if way.cosine < (LOSSY_COSINE if way.name == DEFAULT else COSINE):
                way.missing = f"not counted: cosine of its logits {way.cosine:.3f}"


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
    decode, prefill = way.samples("decode"), way.samples("prefill")
    if way.missing or not decode or not prefill:
        return {"shape": shape, "way": way.name, "note": way.missing or "not run"}
    found: dict[str, Any] = {
        "shape": shape,
        "way": way.name,
        "decode median": 1 / statistics.median(decode),
        "decode best": 1 / min(decode),
        "prefill median": options.prompt / statistics.median(prefill),
        "prefill best": options.prompt / min(prefill),
        "bits/weight": way.facts["bits"],
        "group": way.group,
    }
    if slow := way.slow["prefill"]:
        found["slow tiles"] = f"{len(slow)} of {len(slow) + len(way.seconds['prefill'])}"
    if way.cosine is not None:
        found["cosine"] = way.cosine
    if options.starts == 1 and way.name in WAYS and WAYS[way.name][2] is not None:
        found["compile s"] = sum(way.facts["first"].values())
    if way.cycles is not None:
        found["outside %"] = 100 * cycles.outside(way.cycles)
        found["cycles"] = way.cycles
    return found


COLUMNS = ("shape", "way", "decode median", "decode best", "prefill median", "prefill best")
MORE = ("cosine", "outside %", "bits/weight", "compile s", "group", "slow tiles", "note")
FORMATS = tuple(".4f" if column == "cosine" else ".1f" for column in (*COLUMNS, *MORE))
NOTES = f"""
Tokens a second, batch 1. Decode: one token, static cache of 256 places, {STEPS} tokens a sample.
A work of more than {LONG:.0f} s is one sample.
Prefill: {{prompt}} tokens without a cache, logits of the last one. `ternc` rows: linear weights
ternary by value, head and embedding int8, floating point in fp32, packed by `ternc.quantize`.
`default on a float model`: Gaussian fp32 weights, `torch.compile(model, backend="ternc")` with
nothing set; head and embedding stay fp32, and so do layers that three planes do not reach.
`outside %`: share of the main thread's cycles in decode, by hardware counters (cycles.py), that is
not in ternc's kernels, attention or Inductor's loops; cycles spent waiting for other threads are
left out (the goal is at most {100 * OUTSIDE:.0f} %). The JSON has the classes.
`no module guards`:
`torch.compiler.skip_guard_on_all_nn_modules_unsafe`, which is the user's to choose. `ahead of
time`: decode and prefill by `ternc.export.compile_step` (docs/step.md). `bits/weight`:
the whole model for packed rows. Limits: best samples of all rounds. `cosine`: of the logits after
the prompt, to the first row of the same weights (the fp32 rows and the default have Gaussian ones,
the others ternary ones); of llama.cpp, after 16 tokens, to those of the model that its file was
made from. llama.cpp: llama-cpp-python's, linear weights in TQ2_0 or Q4_0, embedding and head in
Q8_0, a cache in fp16. `group`: rows of one group were alive together and took turns. `slow tiles`:
samples of prefill before or after which a machine with AMX was in its slow state (limits.py); they
count only where there are no others. There every sample runs on cores that were fast when they were
probed together just before it.
"""


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any], prompt: int) -> str:
    cells = [[entry.get(column, "") for column in (*COLUMNS, *MORE)] for entry in rows]
    table = tabulate.tabulate(cells, (*COLUMNS, *MORE), tablefmt="github", floatfmt=FORMATS)
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return f"# Whole models on the CPU\n\n{listed}\n\n{table}\n{NOTES.format(prompt=prompt)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=decoders.SHAPES, default=["gpt2-small"])
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", default="", help="a remark for the record, such as `shared`")
    parser.add_argument("--output", type=Path, help="files of the result, without suffix")
    parser.add_argument("--gguf", type=Path, help="folder of gguf_models.py")
    parser.add_argument("--packed", type=Path, help="folder to keep packed models in")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="for all starts; what is later is not run"
    )
    parser.add_argument(
        "--round-minutes", type=float, default=1e6, help="for all rounds; no round begins later"
    )
    parser.add_argument("--starts", type=int, default=1, help="children that compile at once")
    parser.add_argument("--lock", type=Path, help="file to lock during a round")
    parser.add_argument("--verbose", action="store_true", help="show what the children print")
    options = parser.parse_args()
    options.end = time.perf_counter() + 60 * options.minutes
    options.last = time.perf_counter() + 60 * options.round_minutes
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
            common.write(rows, facts, f"{options.output}.json")
            Path(f"{options.output}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
