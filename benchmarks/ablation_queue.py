"""Jobs shared by processes through a folder: out/<key>.claim while one runs, .json or .error after.

A call goes on where the last one stopped. A job that fails leaves its traceback, the rest goes on.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from ablation_arm import OutOfTime, run_job
from ablation_data import Corpus
from ablation_plan import Job, Settings, plan, read_results

RESTART = 17
"""Exit status of a process that failed in a job: its device may be unusable, a new one goes on."""

POLL = 0.2
"""Seconds between two looks at the folder while others work."""

Run = Callable[[Job], object]


def clear_claims(out: Path) -> None:
    """Forgets what a call that was ended had in hand. Before any process works in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("*.claim"):
        path.unlink()


def run_all(
    corpus: Corpus,
    settings: Settings,
    out: Path,
    deadline: float = math.inf,
    arms: tuple[str, ...] | None = None,
) -> dict[str, dict]:
    """Every job that has no result yet, in this process; returns all results by key."""
    clear_claims(out)
    work(
        plan(settings, arms),
        out,
        lambda job: run_job(job, corpus, settings, out, deadline),
        deadline,
    )
    return read_results(out)


def work(
    jobs: list[Job], out: Path, run: Run, deadline: float = math.inf, isolate: bool = False
) -> bool:
    """Takes jobs until none is left or the deadline passed.

    Args:
        isolate: return after a job that failed, so that a new process goes on.

    Returns:
        False after such a failure.
    """
    while time.monotonic() < deadline:
        pending = [job for job in jobs if not _settled(job.key, out)]
        ready = [job for job in pending if _ready(job, out)]
        if not ready:
            return True  # nothing is left, or what is left waits for jobs that are not here
        job = next((job for job in ready if _claim(job, out)), None)
        if job is None:
            time.sleep(POLL)
            continue
        print(f"ablation: {job.key}", file=sys.stderr, flush=True)
        try:
            run(job)
        except OutOfTime:
            return True
        except Exception:
            (out / f"{job.key}.error").write_text(traceback.format_exc())
            print(f"ablation: {job.key} failed", file=sys.stderr, flush=True)
            if isolate:
                return False
        finally:
            (out / f"{job.key}.claim").unlink(missing_ok=True)
    return True


def spawn(arguments: list[str], devices: int) -> None:
    """So many processes, in turn on each GPU, with one command line; a failed one starts again."""
    processes: dict[int, subprocess.Popen] = {}
    for device in range(devices):
        processes[device] = _start(arguments, device)
    while processes:
        time.sleep(POLL)
        for device, process in list(processes.items()):
            if process.poll() is None:
                continue
            del processes[device]
            if process.returncode == RESTART:
                processes[device] = _start(arguments, device)


def _start(arguments: list[str], device: int) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu_of(device)}
    command = [sys.executable, *arguments, "--worker"]
    return subprocess.Popen(command, env=environment)


def gpu_of(process: int) -> str:
    """The GPU of a process, as the driver names it: in turn of those that are visible."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return seen[process % len(seen)].strip() if seen else ""


def _settled(key: str, out: Path) -> bool:
    return (out / f"{key}.json").is_file() or (out / f"{key}.error").is_file()


def _ready(job: Job, out: Path) -> bool:
    """Everything it needs has ended, and one job at least of every arm that it needs well."""
    done = {key.split("@")[0] for key in job.needs if (out / f"{key}.json").is_file()}
    return all(_settled(key, out) and key.split("@")[0] in done for key in job.needs)


def _claim(job: Job, out: Path) -> bool:
    try:
        os.close(os.open(out / f"{job.key}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    if _settled(job.key, out):  # between the look and the claim
        (out / f"{job.key}.claim").unlink()
        return False
    return True
