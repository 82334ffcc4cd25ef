"""Corpus -> train -> quantize -> save, load -> torch.compile -> report, quality, speed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ternc
from ternc.demo.corpus import Corpus, read_corpus
from ternc.demo.measure import interleaved_medians
from ternc.demo.model import ByteDecoder
from ternc.demo.train import bits_per_byte, train
from ternc.reporting import Report, Row, model_bytes

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and length of the demo."""

    seconds: float = 90.0
    """Training time."""
    seed: int = 0
    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 768
    context: int = 256
    batch: int = 16
    """Windows in a training step."""
    train_length: int = 128
    """Bytes in a training window."""
    windows: int = 128
    """Held-out windows of `context` bytes that quality is measured on."""
    rounds: int = 50
    """Timed calls of each variant."""
    inner: str = "inductor"
    """Compiler of what ternc leaves alone; "eager" also leaves Inductor out of the comparison."""

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """The same flow in seconds: nothing is learnt and Inductor is left out."""
        return cls(
            seconds=0.5, seed=seed, width=64, layers=1, heads=2, hidden=128, context=64, batch=4,
            train_length=32, windows=4, rounds=3, inner="eager",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the trained model, measured."""

    name: str
    bits_per_byte: float
    """On held-out text."""
    bytes: int
    """Parameters, buffers and packed copies in memory."""
    decode: float
    """Seconds for one token, batch 1."""
    prefill: float
    """Seconds for a whole context, batch 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the demo found."""

    settings: Settings
    train_bytes: int
    held_out_bytes: int
    steps: int
    variants: list[Variant]
    reports: dict[str, Report]
    """Report of each compiled variant, after it ran."""

    @property
    def on_reference(self) -> list[Row]:
        """Rewritten layers that no kernel ran, in any variant."""
        reports = self.reports.values()
        return [
            row
            for report in reports
            for row in report.rewritten
            if row.shape and row.kernel in (None, "reference")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "train_bytes": self.train_bytes,
            "held_out_bytes": self.held_out_bytes,
            "steps": self.steps,
            "variants": [variant.to_dict() for variant in self.variants],
            "reports": {name: report.to_dict() for name, report in self.reports.items()},
        }


def run_demo(settings: Settings, say: Callable[[str], None]) -> Outcome:
    """Run the whole line; `say` gets a line of progress now and then."""
    corpus = read_corpus(context=settings.context)
    say(
        f"text: {corpus.files} files of the standard library, {len(corpus.train) / 1e6:.1f} MB to "
        f"train on, {len(corpus.held_out) / 1e6:.1f} MB held out"
    )
    torch.manual_seed(settings.seed)
    model = new_model(settings)
    say(f"training {model_bytes(model) / 4e6:.1f} M parameters for {settings.seconds:.0f} s")
    steps = train(
        model,
        corpus.train,
        seconds=settings.seconds,
        batch=settings.batch,
        length=settings.train_length,
        seed=settings.seed,
        say=say,
    )
    model.eval().requires_grad_(False)
    # All variants share the class's code, and with it Dynamo's limit of 8 compiled forms.
    with torch._dynamo.config.patch(recompile_limit=64):
        variants, reports = compare(model, corpus, settings, say)
    return Outcome(settings, len(corpus.train), len(corpus.held_out), steps, variants, reports)


def new_model(settings: Settings) -> ByteDecoder:
    """The untrained model of these settings."""
    return ByteDecoder(
        settings.width, settings.layers, settings.heads, settings.hidden, settings.context
    )


def compare(
    model: ByteDecoder, corpus: Corpus, settings: Settings, say: Callable[[str], None]
) -> tuple[list[Variant], dict[str, Report]]:
    """Quality, size and speed of the float model and of each rewritten form of it."""
    options: dict[str, Any] = {"inner": settings.inner}
    modules: dict[str, torch.nn.Module] = {"eager fp32": model}
    forwards: dict[str, Forward] = {"eager fp32": model}
    if settings.inner == "inductor":
        modules["Inductor fp32"] = model
        forwards["Inductor fp32"] = torch.compile(model)
    for name, config in (("planes=auto", ternc.Config()), ("planes=1", ternc.Config(planes=1))):
        say(f"quantize, save, load: {name}")
        modules[f"ternc {name}"] = packed = save_and_load(model, config, settings)
        forwards[f"ternc {name}"] = torch.compile(packed, backend="ternc", options=options)
    modules["ternc backend only"] = model
    forwards["ternc backend only"] = torch.compile(model, backend="ternc", options=options)

    quality = {}
    for name, forward in forwards.items():
        say(f"compile and score on held-out text: {name}")
        quality[name] = bits_per_byte(forward, corpus.held_out, settings.context, settings.windows)
    say("measure speed, all variants in turn")
    window = corpus.held_out[: settings.context].long()[None]
    prefill = speed(forwards, window, settings.rounds)
    decode = speed(forwards, window[:, :1], settings.rounds)
    reports = {name: ternc.report(module) for name, module in modules.items() if "ternc" in name}
    memory = {name: model_bytes(module) for name, module in modules.items()}
    # The backend keeps its packed copies beside the float weights.
    memory["ternc backend only"] += sum(
        row.bytes_after for row in reports["ternc backend only"].rewritten
    )
    variants = [
        Variant(name, quality[name], memory[name], decode[name], prefill[name]) for name in forwards
    ]
    return variants, reports


def save_and_load(model: ByteDecoder, config: ternc.Config, settings: Settings) -> torch.nn.Module:
    """The quantised model as a user gets it back: written to a folder and read again."""
    quantized = ternc.quantize(model, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        ternc.save(quantized, path)
        return ternc.load(path, model=new_model(settings)).eval()


@torch.inference_mode()
def speed(forwards: dict[str, Forward], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each forward on `ids` [1, T]."""
    calls = {name: (lambda forward=forward: forward(ids)) for name, forward in forwards.items()}
    return interleaved_medians(calls, rounds)
