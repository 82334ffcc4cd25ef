"""What the machine allows, measured in the same rounds as the kernels: reading, and multiplying.

limits.cpp --$CXX--> library; threads of a pool start together and report their own times, so that
starting them costs nothing of a sample.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ternc.csrc import build

READ_BYTES = 192 << 20
"""The windows of the reads rotate over these: beyond the caches."""
MULTIPLY_SECONDS = 100e-6
UNITS = {
    "amx": "tdpbssd",
    "avx512vnni": "vpdpbusd 512",
    "avxvnni": "vpdpbusd 256",
    "avx2": "vpmaddubsw 256",
}
"""Multiply instruction by instruction set; the bare rate of others is not known here."""
TILE_PROBE = "tdpbssd with loads"
FAST_TILE_SECONDS = 10e-9
"""Machines with AMX have a state in which four tile loads and products take 25 to 30 ns each
instead of 7: rows with AMX compare only where the probe is below this."""
TILE_OPERATIONS = 2 * 16 * 16 * 64
WAKE_SECONDS = 500e-6
"""Of products in front of the timed ones: a core that has slept starts slowly."""
CANDIDATES = 6
"""Cores, the fastest one by one, of which those that are fastest together are taken."""
PROBES = 3
"""Probes of a core, or of several cores together, of which the median counts."""


def place(process: int, cores: Sequence[int]) -> None:
    """The main thread of a process onto the first of `cores`, the others onto the rest: a pool's
    threads then never share a core.
    """
    for task in os.listdir(f"/proc/{process}/task"):
        _pin(int(task), cores[:1] if int(task) == process else cores[1:] or cores)


def _pin(task: int, cores: Sequence[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
        os.sched_setaffinity(task, cores)


class _Times(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_double), ("end", ctypes.c_double))


@dataclasses.dataclass
class Rate:
    """Samples of one limit, in bytes or operations a second; empty: this machine has none."""

    samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> float | None:
        return max(self.samples, default=None)

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None


class Limits:
    """Limits of `threads` threads for kernels of one instruction set; `nbytes` a sample is read."""

    def __init__(self, threads: int, isa: str) -> None:
        self.threads, self.isa, self.unit = threads, isa, UNITS.get(isa, "")
        self.read, self.multiply, self.tiles = Rate(), Rate(), Rate()
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._bytes = torch.ones(READ_BYTES + 4096, dtype=torch.uint8)
        self._offset = 0
        self._cores = sorted(os.sched_getaffinity(0))
        self._settled: Sequence[int] = ()
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "limits.so"
            source = str(Path(__file__).with_name("limits.cpp"))
            command = [*build.find_compiler(), "-O3", "-shared", "-fPIC", "-o", str(library)]
            subprocess.run([*command, source], check=True)
            self._native = ctypes.CDLL(str(library))
        self._native.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._native.multiply.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p]
        self._native.multiply.restype = ctypes.c_int64
        self._rounds: dict[str, int] = {}
        self._rounds = {unit: self._calibrate(unit) for unit in (self.unit, TILE_PROBE)}

    def clear(self) -> None:
        """Forget the samples of an earlier table."""
        self.read, self.multiply, self.tiles = Rate(), Rate(), Rate()

    def sample(self, nbytes: int) -> None:
        """One sample of each limit; the read takes `nbytes` in all, in whole pages a thread."""
        self.read.samples.append(self._read(nbytes))
        if rate := self._multiply(self.unit):
            self.multiply.samples.append(rate)

    def tiles_are_fast(self) -> bool:
        """Probe the AMX state; True too where AMX is not in use."""
        seconds = self._tile_seconds()
        if seconds:
            self.tiles.samples.append(self.threads * TILE_OPERATIONS / seconds)
        return seconds < FAST_TILE_SECONDS

    def settle(self) -> Sequence[int]:
        """Move the process to cores in the fast AMX state, which comes and goes by core; which.

        Probed together: two of them may be one core of the machine. What the caches of a core hold
        stays behind. Without AMX: no cores, and nothing is moved.
        """
        if not self._rounds[TILE_PROBE]:
            return ()
        if self._settled and self._tile_seconds() < FAST_TILE_SECONDS:
            return self._settled
        ranked = sorted(self._cores, key=lambda core: self._seconds_on((core,)))
        candidates = ranked[: max(CANDIDATES, self.threads)]
        groups = itertools.combinations(candidates, self.threads)
        self._settled = min(groups, key=self._seconds_on)
        place(os.getpid(), self._settled)
        return self._settled

    def release(self) -> None:
        """Undo `settle`: the process may run on every core again."""
        self._settled = ()
        for task in os.listdir("/proc/self/task"):
            _pin(int(task), self._cores)

    def _seconds_on(self, cores: Sequence[int]) -> float:
        """Of one tile product with its loads, where each of `cores` does the same."""
        found = (self._run(TILE_PROBE, cores) for _ in range(PROBES))
        return statistics.median(
            seconds * len(cores) * TILE_OPERATIONS / operations for seconds, operations in found
        )

    def _tile_seconds(self) -> float:
        """Of one tile product with its loads, on the threads of this process."""
        rate = self._multiply(TILE_PROBE)
        return self.threads * TILE_OPERATIONS / rate if rate else 0.0

    def _read(self, nbytes: int) -> float:
        part = -(-nbytes // self.threads // 4096) * 4096
        if self._offset + part * self.threads > READ_BYTES:
            self._offset = 0
        first = -(-self._bytes.data_ptr() // 4096) * 4096 + self._offset
        self._offset += part * self.threads
        read = self._native.read_all

        def run(i: int, times: Any) -> int:
            return read(first + i * part, part, ctypes.byref(times))

        times, _ = self._together(run, self._settled)
        seconds = max(t.end for t in times) - min(t.begin for t in times)
        return part * self.threads / seconds

    def _multiply(self, unit: str) -> float | None:
        if not self._rounds[unit]:
            return None
        seconds, operations = self._run(unit, self._settled)
        return operations / seconds

    def _run(self, unit: str, cores: Sequence[int]) -> tuple[float, int]:
        """Seconds of the slowest thread, operations of all: of the last of several runs, for a core
        that has slept, and its tile unit, start slowly.
        """
        rounds, multiply = self._rounds[unit], self._native.multiply

        def run(times: Any) -> int:
            awake = time.perf_counter() + WAKE_SECONDS
            while True:
                done = multiply(unit.encode(), rounds, ctypes.byref(times))
                if time.perf_counter() >= awake:
                    return done

        times, done = self._together(lambda _, times: run(times), cores)
        return max(t.end - t.begin for t in times), sum(done)

    def _together(
        self, call: Callable[[int, Any], int], cores: Sequence[int]
    ) -> tuple[Sequence[Any], list[int]]:
        """call(thread, times) on a thread of each core at once, or on all threads wherever they are
        -> their times, their results.
        """
        count = len(cores) or self.threads
        times = (_Times * count)()

        def run(i: int) -> int:
            if cores:
                _pin(0, cores[i : i + 1])  # this thread: two on one core would take turns
            return call(i, times[i])

        self._native.close_gate(count)
        done = list(self._pool.map(run, range(count)))
        return times, done

    def _calibrate(self, unit: str) -> int:
        """Rounds that take `MULTIPLY_SECONDS`; 0: not here, or not to be tried here."""
        if not unit or (unit == TILE_PROBE and self.isa != "amx"):
            return 0
        seconds, self._rounds[unit] = 0.0, 64
        while seconds < MULTIPLY_SECONDS:
            self._rounds[unit] *= 2
            seconds, operations = self._run(unit, ())
            if not operations:
                return 0
        return self._rounds[unit]
