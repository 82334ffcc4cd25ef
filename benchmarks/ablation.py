"""Which training techniques help: one small byte-level model, many arms, equal bytes for all.

    python benchmarks/ablation.py --data FOLDER --also TEXT --out RESULTS --minutes 9 --devices 2
    python benchmarks/ablation.py --data FOLDER --check        every recipe, three steps each
    python benchmarks/ablation.py --data FOLDER --time whole   a step of QAT against one in bf16
    python benchmarks/ablation.py --out RESULTS --write benchmarks/results

An arm is a float model, BitNet b1.58, a recipe of `ternc.train`, or the float model quantised after
training; the packed model is scored in bits per byte. Learning rates are chosen on a part of the
text that is not scored. A call goes on where the last one stopped, within its minutes; `--export`
and `--carry-on` take results and teacher to another machine in a few small files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import ablation_table  # noqa: E402
from ablation_arm import load_teacher  # noqa: E402
from ablation_data import read  # noqa: E402
from ablation_plan import Settings, plan, read_results, teacher_of  # noqa: E402
from ablation_queue import RESTART, clear_claims, run_all, spawn, work  # noqa: E402
from ablation_teacher import export_teacher, import_teacher  # noqa: E402

TIMED = ("bitnet", "modern", "full")

LAST_START = 40.0
"""Seconds before the end of a call in which no job starts: it would compile and hardly train."""


def main() -> int:
    """Command line."""
    arguments = _parser().parse_args()
    settings = _settings(arguments)
    # Wall time: the processes of one call share it.
    deadline = arguments.until or time.time() + 60 * arguments.minutes
    if arguments.check and not arguments.worker:
        shutil.rmtree(arguments.out, ignore_errors=True)
    if arguments.carry_on and not arguments.worker:
        carry_on(arguments.carry_on, arguments.out, settings)
    if arguments.data is not None:
        if arguments.devices > 1 and not arguments.worker and not arguments.time:
            clear_claims(arguments.out)
            spawn([*sys.argv, "--until", str(deadline)], arguments.devices)
        elif status := _run(arguments, settings, deadline):
            return status
    results = read_results(arguments.out)
    if arguments.worker or arguments.time:
        return 0
    for path in sorted(arguments.out.glob("*.error")):
        print(f"{path.stem}: {path.read_text().strip().splitlines()[-1]}")
    print(ablation_table.table(ablation_table.lengths(results)[0]))
    print("\n".join(ablation_table.longer(results)))
    if arguments.export:
        export(arguments.out, arguments.export, settings)
    if arguments.write:
        ablation_table.write(results, arguments.write, _facts(arguments))
    return 1 if arguments.check and list(arguments.out.glob("*.error")) else 0


def _run(arguments: argparse.Namespace, settings: Settings, deadline: float) -> int:
    """The jobs or timings of this process; its exit status."""
    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")
    corpus = read(arguments.data, arguments.also, settings.device)
    if arguments.time:
        from ablation_steps import measure

        found = measure(corpus, settings, arguments.time == "whole", tuple(arguments.arms or TIMED))
        print(json.dumps(found))
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = "_".join(filter(None, ["steps", arguments.time, arguments.mode]))
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1))
        return 0
    arms = tuple(arguments.arms) if arguments.arms else None
    stop = time.monotonic() + deadline - time.time()
    if not arguments.worker:
        run_all(corpus, settings, arguments.out, stop, arms)
        return 0
    from ablation_arm import run_job

    jobs = plan(settings, arms)

    def run(job):
        return run_job(job, corpus, settings, arguments.out, stop)

    return 0 if work(jobs, arguments.out, run, stop - LAST_START, isolate=True) else RESTART


def export(out: Path, folder: Path, settings: Settings) -> None:
    """results.json, and the best float model in pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(out)
    timings = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("steps_*.json"))}
    errors = {path.stem: path.read_text() for path in sorted(out.glob("*.error"))}
    value = {"results": results, "timings": timings, "errors": errors}
    (folder / "results.json").write_text(json.dumps(value, indent=1))
    if teacher_of(results, settings, None) is not None:
        export_teacher(load_teacher(settings, out), folder)


def carry_on(folder: Path, out: Path, settings: Settings) -> None:
    """Inverse of `export`; what `out` has already is kept."""
    out.mkdir(parents=True, exist_ok=True)
    value = json.loads((folder / "results.json").read_text())
    for key, result in value["results"].items():
        if not (out / f"{key}.json").exists():
            (out / f"{key}.json").write_text(json.dumps(result, indent=1))
    for name, timing in value["timings"].items():
        (out / f"{name}.json").write_text(json.dumps(timing, indent=1))
    known = teacher_of(read_results(out), settings, None)
    # A table needs no teacher.
    if known is not None and any(folder.glob("teacher.*.z")):
        torch.save(import_teacher(folder), out / f"{known['key']}.pt")


def _facts(arguments: argparse.Namespace) -> dict[str, object]:
    from common import commit

    timings = sorted(arguments.out.glob("steps_*.json"))
    return {"commit": commit(), "timings": {p.stem: json.loads(p.read_text()) for p in timings}}


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = Settings.smoke() if arguments.smoke else Settings(compiled=not arguments.eager)
    settings = dataclasses.replace(settings, device=arguments.device, mode=arguments.mode)
    changes = {name: getattr(arguments, name) for name in ("steps", "longer", "batch", "layers")}
    for name in ("rates", "controls"):
        changes[name] = tuple(getattr(arguments, name)) if getattr(arguments, name) else None
    settings = dataclasses.replace(settings, **{k: v for k, v in changes.items() if v is not None})
    if arguments.check:
        once = {"rates": settings.rates[-1:], "seeds": settings.seeds[:1], "windows": 32}
        once.update(controls=(), longer=0)
        settings = dataclasses.replace(settings, steps=3, **once)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="folder of text files")
    add("--also", type=Path, action="append", default=[], help="score on this text too")
    add("--out", type=Path, default=Path("ablation"), help="results")
    add("--minutes", type=float, default=math.inf, help="stop after so many")
    add("--devices", type=int, default=1, help="processes, in turn on each GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--arms", nargs="+", help=", ".join(dict.fromkeys(job.arm for job in plan(Settings()))))
    for name in ("steps", "batch", "layers"):
        add(f"--{name}", type=int)
    add("--longer", type=int, help="train float, BitNet and the preset `full` so many steps too")
    add("--rates", type=float, nargs="+", help="learning rates of the arms that get several")
    add("--controls", type=float, nargs="+", help="rates tried beside them; no arm moves to one")
    add("--smoke", action="store_true", help="a tiny model, seconds an arm")
    add("--check", action="store_true", help="three steps of every arm, then stop; 1 if one fails")
    add("--time", choices=("whole", "blocks"), help="time steps of the model compiled so")
    add("--mode", help="of torch.compile, for --time: reduce-overhead replays CUDA graphs")
    add("--eager", action="store_true", help="without torch.compile")
    add("--export", type=Path, help="results and teacher to this folder")
    add("--carry-on", type=Path, help="results and teacher from such a folder first")
    add("--write", type=Path, help="table, plot and JSON to this folder")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help="stop at this time, in seconds since 1970")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
