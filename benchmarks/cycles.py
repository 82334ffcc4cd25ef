"""Cycles of one thread by what they were spent on: the share of a step outside of kernels.

    work --perf, 5 kHz--> samples (library, symbol) --classify--> share of each class

Hardware counters sample a run that is otherwise untouched: no event is recorded by the program, and
time in which other processes have the core does not count. A profiler of operators cannot tell
this: what it takes itself, and what Inductor adds for it (a parsed stack trace a call), doubled it.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

SAMPLES_PER_SECOND = 5000
_INSTRUCTION_SETS = "scalar|avx2|avxvnni|avx512vnni|amx|neon|neon_dotprod"
CLASSES = (
    ("kernels", re.compile(rf"\bternc::({_INSTRUCTION_SETS})::|cpp_fused_|^kernel$")),
    # The parallel region of attention, its matrix products, and what they call in MKL or oneDNN.
    ("attention", re.compile(r"flash_attention|scaled_dot_product|^mkl_|gemm|gemv|dnnl")),
)
"""Class -> symbols; the first that fits. What fits none and is no waiting is outside."""
WAITING = "waiting for threads"
THREADS = re.compile(r"lib(g|i|)omp")
OUTSIDE = ("guards and Python", "calls")
INTERPRETER = re.compile(r"libpython|libtorch_python|_C\.cpython|dynamo")


def sampled(work: Callable[[], object]) -> dict[str, float] | None:
    """Share of each class, sum 1, of this thread's cycles in `work`; None without perf."""
    if shutil.which("perf") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        thread = str(threading.get_native_id())
        rate = str(SAMPLES_PER_SECOND)
        command = ["perf", "record", "-F", rate, "-e", "cycles", "-t", thread, "-o", data]
        recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0)  # until it has attached itself
        try:
            work()
        finally:
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
        report = ["perf", "report", "-i", data, "--sort", "dso,symbol", "-t", ";", "--stdio"]
        found = subprocess.run(report, capture_output=True, text=True, check=False)
    return shares(samples(found.stdout))


def samples(report: str) -> list[tuple[float, str, str]]:
    """Lines `12.3%;library;[.] symbol` of perf's report -> (12.3, library, symbol)."""
    matches = (re.match(r"\s*([\d.]+)%\s*;([^;]*);(.*)", line) for line in report.splitlines())
    return [(float(m[1]), m[2].strip(), m[3].strip()) for m in matches if m]


def shares(rows: list[tuple[float, str, str]]) -> dict[str, float] | None:
    """(weight, library, symbol) -> share of each class; None where there is no sample."""
    found: Counter[str] = Counter()
    for weight, library, symbol in rows:
        found[classify(library, symbol.removeprefix("[.]").strip())] += weight
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()} if total else None


def classify(library: str, symbol: str) -> str:
    for name, pattern in CLASSES:
        if pattern.search(symbol):
            return name
    if THREADS.search(library):
        return WAITING
    interpreted = INTERPRETER.search(library) or INTERPRETER.search(symbol)
    return OUTSIDE[0] if interpreted else OUTSIDE[1]


def outside(found: dict[str, float]) -> float:
    """The share that no kernel and no attention takes, of what is not waiting for threads: how long
    that is depends on who else has the other cores.
    """
    busy = 1.0 - found.get(WAITING, 0.0)
    return sum(found.get(name, 0.0) for name in OUTSIDE) / busy if busy else 0.0
