"""Which training techniques help: one small byte-level model, many arms, equal bytes for all.

    python benchmarks/ablation.py --data FOLDER --out RESULTS [--minutes 9] [--device cuda]

FOLDER holds text files, split by a hash of their names (1 in 20 for validation). An arm is a float
model, BitNet b1.58, or a recipe of `ternc.train`; its packed model is scored in bits per byte. Each
arm leaves RESULTS/<arm>.json; a call goes on where the last one stopped, within its minutes, and
prints the table of what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import ternc  # noqa: E402
from ternc.config import Config  # noqa: E402
from ternc.demo.corpus import is_held_out  # noqa: E402
from ternc.demo.model import ByteDecoder  # noqa: E402
from ternc.demo.train import bits_per_byte  # noqa: E402
from ternc.errors import TerncError  # noqa: E402
from ternc.train import (  # noqa: E402
    Hadamard,
    Momentum,
    Regularization,
    TrainConfig,
    Trainer,
    insert_subln,
    preset,
)
from ternc.train.presets import STAGES  # noqa: E402

FLOAT = TrainConfig(weights=Config(planes=1, exclude=("*",)))
"""No site: the same trainer, data and schedule, nothing quantised."""

RATED = ("float", "bitnet", "full")
"""Arms that get the best of the learning rates; the others use that of `full`."""


def recipes() -> dict[str, TrainConfig]:
    """Arm -> configuration, in the order in which they run."""
    full = preset("full")
    known = full.distillation
    assert known is not None
    return {
        "float": FLOAT.replace(optimization=preset("modern").optimization),
        "bitnet": preset("bitnet_b158"),
        "full": full,
        "modern": preset("modern"),
        "warm_start": preset("warm_start"),
        "full-kl": full.replace(distillation=None),
        "full-ramp": full.replace(schedule=None),
        "full-dead_zone": full.replace(dead_zone=0.0),
        "full+stages": full.replace(schedule=STAGES),
        "full+hadamard": full.replace(hadamard=Hadamard()),
        "full+gradient": full.replace(distillation=dataclasses.replace(known, beta=1.0)),
        "full+hvp": full.replace(distillation=dataclasses.replace(known, beta=0.1, gradient="hvp")),
        "full+feature": full.replace(
            distillation=dataclasses.replace(known, gamma=0.1, balance=True)
        ),
        "full+penalty": full.replace(regularization=Regularization()),
        "full+momentum": full.replace(momentum=Momentum()),
        "full+muon": full.replace(optimization=dataclasses.replace(full.optimization, name="muon")),
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and length of every arm."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 1408
    context: int = 1024
    batch: int = 32
    steps: int = 4600
    """150 million bytes."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    seeds: tuple[int, ...] = (0, 1)
    """The second one for the arms of RATED alone."""
    windows: int = 256
    """Validation windows of `context` bytes."""
    parts: int = 10
    """Checkpoints of an arm."""
    device: str = "cpu"
    compiled: bool = False
    inner: str = "inductor"

    @classmethod
    def smoke(cls) -> Settings:
        """Seconds an arm: guards the order of float, BitNet and ternc."""
        return cls(
            width=64, layers=2, heads=2, hidden=128, context=64, batch=8, steps=250,
            rates=(3e-3, 1e-2), seeds=(0, 1, 2), windows=64, parts=1,
        )  # fmt: skip


class Windows:
    """Random windows of a text as batches int64 [batch, length + 1], in the order of a seed."""

    def __init__(self, text: torch.Tensor, batch: int, length: int, count: int, seed: int) -> None:
        self.text, self.batch, self.length, self.count = text, batch, length, count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        reach = torch.arange(self.length + 1)
        for _ in range(self.count):
            starts = torch.randint(
                len(self.text) - self.length, (self.batch, 1), generator=self.generator
            )
            yield self.text[starts + reach].long()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts as uint8 tensors: one to train on, several to score on, by name."""

    train: torch.Tensor
    scored: dict[str, torch.Tensor]


class OutOfTime(Exception):
    """The call's minutes are over; the arm's checkpoint is written."""


def read(folder: Path, others: list[Path]) -> Corpus:
    """Text files of a folder, split by name; each of `others` is scored on as well."""
    train, valid = bytearray(), bytearray()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        part = valid if is_held_out(name) or "valid" in path.stem else train
        part += path.read_bytes() + b"\n"
    if not train or not valid:
        raise TerncError(f"{folder}: {len(train)} bytes to train on, {len(valid)} to score on")
    scored = {"valid": _tensor(bytes(valid))}
    scored.update({path.stem: _tensor(path.read_bytes()) for path in others})
    return Corpus(_tensor(bytes(train)), scored)


def run_arm(
    name: str,
    config: TrainConfig,
    corpus: Corpus,
    settings: Settings,
    seed: int,
    out: Path,
    teacher: torch.nn.Module | None = None,
    deadline: float = math.inf,
) -> dict:
    """Trains and scores one arm, or goes on with it; its result is also in out/<name>.json."""
    torch.manual_seed(seed)
    model = new_model(settings)
    trainer_model: torch.nn.Module = ternc.train.prepare(model, config, inplace=True)
    if settings.compiled:
        backend = {"backend": "ternc", "options": {"inner": settings.inner}}
        trainer_model = torch.compile(model, **(backend if name.split("@")[0] != "float" else {}))
    folder = out / f"{name}-run"

    def watch(trainer: Trainer, row: dict) -> None:
        if time.monotonic() > deadline:
            trainer.save(folder / "last")
            raise OutOfTime

    trainer = Trainer(
        trainer_model, config, teacher if config.distillation else None, folder=folder,
        log_every=max(1, settings.steps // 50), callbacks=[watch],
    )  # fmt: skip
    per_part = settings.steps // settings.parts
    loader = Windows(corpus.train, settings.batch, settings.context, per_part, seed)
    resume = folder / "last" if (folder / "last" / "training.json").is_file() else None
    start = time.monotonic()
    rows = trainer.train(loader, num_epochs=settings.parts, resume=resume)
    seconds = time.monotonic() - start
    scores = score(trainer.inner, corpus, settings)
    checkpoint = out / f"{name}.pt"
    torch.save(model.state_dict(), checkpoint)
    result = {
        "arm": name,
        "seed": seed,
        "rate": config.optimization.learning_rate,
        "bytes": settings.steps * settings.batch * settings.context,
        "seconds_of_last_call": seconds,
        "train_loss": rows[-1]["loss"],
        "zero_fraction": rows[-1]["zero_fraction"],
        "bits_per_byte": scores,
        "torch": torch.__version__,
        "device": settings.device,
        "config": config.to_dict(),
    }
    _write(out / f"{name}.json", result)
    return result


def score(model: torch.nn.Module, corpus: Corpus, settings: Settings) -> dict[str, float]:
    """Bits per byte of the packed model (of the model itself where it has no site)."""
    packed = ternc.quantize(model).eval() if ternc.sites(model) else model.eval()

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return packed(ids.to(settings.device)).float().cpu()

    return {
        name: bits_per_byte(forward, text, settings.context, settings.windows)
        for name, text in corpus.scored.items()
    }


def new_model(settings: Settings) -> torch.nn.Module:
    """The same architecture for every arm, an RMSNorm before each output projection included."""
    model = ByteDecoder(
        settings.width, settings.layers, settings.heads, settings.hidden, settings.context
    )
    insert_subln(model)
    return model.to(settings.device)


def run_all(
    corpus: Corpus,
    settings: Settings,
    out: Path,
    deadline: float = math.inf,
    arms: tuple[str, ...] | None = None,
) -> dict[str, dict]:
    """Every arm that has no result yet, until the deadline; returns all results by name."""
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OutOfTime):
        for arm, recipe in recipes().items():
            if arms is not None and arm not in arms:
                continue
            for seed in settings.seeds if arm in RATED else settings.seeds[:1]:
                rates = settings.rates
                if arm not in RATED or seed != settings.seeds[0]:
                    family = arm if arm in RATED else "full"
                    rates = (best(out, family, settings.seeds[0])["rate"],)
                for rate in rates:
                    name = f"{arm}@{rate:g}-s{seed}"
                    if (out / f"{name}.json").is_file():
                        continue
                    if time.monotonic() > deadline:
                        raise OutOfTime
                    config = with_rate(recipe, rate, seed, settings)
                    teacher = teacher_of(config, settings, out)
                    print(f"ablation: {name}", file=sys.stderr, flush=True)
                    run_arm(name, config, corpus, settings, seed, out, teacher, deadline)
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def with_rate(config: TrainConfig, rate: float, seed: int, settings: Settings) -> TrainConfig:
    """The recipe at a learning rate, in bf16 on a GPU."""
    return config.replace(
        optimization=dataclasses.replace(config.optimization, learning_rate=rate),
        autocast="bfloat16" if settings.device == "cuda" else None,
        seed=seed,
    )


def best(out: Path, family: str, seed: int) -> dict:
    """The result of the arm's best learning rate, by the validation text."""
    found = [json.loads(path.read_text()) for path in out.glob(f"{family}@*-s{seed}.json")]
    return min(found, key=lambda result: result["bits_per_byte"]["valid"])


def teacher_of(config: TrainConfig, settings: Settings, out: Path) -> torch.nn.Module | None:
    """The best float arm, for recipes that distil."""
    if config.distillation is None:
        return None
    model = new_model(settings)
    name = best(out, "float", settings.seeds[0])["arm"]
    model.load_state_dict(torch.load(out / f"{name}.pt", map_location=settings.device))
    return model.eval()


def table(results: dict[str, dict], seeds: tuple[int, ...]) -> str:
    """Markdown: each arm at its best rate, its gap to float, and how much of BitNet's it closes."""
    by_arm: dict[str, dict] = {}
    for result in results.values():
        arm = result["arm"].split("@")[0]
        known = by_arm.get(arm)
        if result["seed"] == seeds[0] and (known is None or _valid(result) < _valid(known)):
            by_arm[arm] = result
    names = [arm for arm in recipes() if arm in by_arm]
    if not names:
        return "no result yet"
    columns = list(by_arm[names[0]]["bits_per_byte"])
    lines = [
        "| arm | rate | " + " | ".join(columns) + " | gap to float | BitNet's gap closed |",
        "|---" * (len(columns) + 4) + "|",
    ]
    base, other = (_valid(by_arm[n]) if n in by_arm else math.nan for n in ("float", "bitnet"))
    for arm in names:
        result = by_arm[arm]
        gap = _valid(result) - base
        closed = 1 - gap / (other - base) if other != base else math.nan
        scores = " | ".join(f"{result['bits_per_byte'][column]:.4f}" for column in columns)
        lines.append(f"| {arm} | {result['rate']:g} | {scores} | {gap:+.4f} | {closed:.0%} |")
    for arm in RATED:
        found = [r for r in results.values() if r["arm"].split("@")[0] == arm]
        per_seed = {r["seed"]: _valid(r) for r in sorted(found, key=_valid, reverse=True)}
        if len(per_seed) > 1:
            spread = torch.tensor(list(per_seed.values())).std().item()
            lines.append(f"\n{arm}: standard deviation over {len(per_seed)} seeds {spread:.4f}")
    return "\n".join(lines)


def _valid(result: dict) -> float:
    return result["bits_per_byte"]["valid"]


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _write(path: Path, value: dict) -> None:
    staged = path.with_suffix(".part")
    staged.write_text(json.dumps(value, indent=1))
    os.replace(staged, path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of text files")
    parser.add_argument("--also", type=Path, action="append", default=[], help="score on this too")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="results")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--arms", nargs="+", default=None, help=", ".join(recipes()))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds an arm")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    settings = Settings.smoke() if arguments.smoke else Settings(compiled=not arguments.eager)
    settings = dataclasses.replace(settings, device=arguments.device)
    if arguments.steps:
        settings = dataclasses.replace(settings, steps=arguments.steps)
    deadline = time.monotonic() + 60 * arguments.minutes
    corpus = read(arguments.data, arguments.also)
    arms = tuple(arguments.arms) if arguments.arms else None
    results = run_all(corpus, settings, arguments.out, deadline, arms)
    print(table(results, settings.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
