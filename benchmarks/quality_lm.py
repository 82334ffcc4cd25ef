"""A byte-level language model, trained and quantised in every way: bits per byte in one table.

    python benchmarks/quality_lm.py --data FOLDER --also FILE --out RESULTS [--minutes 9]

FOLDER/train and FOLDER/valid hold text files. The float model (25.7 M parameters) is trained in
bf16 on the first, once: RESULTS keeps it. Every row quantises it anew, calibrated on windows of the
training text, and is scored on the validation text and on FILE. ternc's models are saved, loaded
into a fresh model and scored as packed; the others as float weights. A row is written as soon as it
is known; a call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from byte_lm import Settings, load_model, new_model, save_model, train  # noqa: E402
from quality_baselines import (  # noqa: E402
    GROUP,
    absmean,
    gptq,
    greedy,
    integer,
    linears,
    reference_stack,
    replace_weights,
)
from quality_lm_table import table  # noqa: E402

import ternc  # noqa: E402
from ternc.calibration.distance import kl_divergence  # noqa: E402
from ternc.calibration.reconstruct import Reconstruction, reconstruct  # noqa: E402
from ternc.calibration.tune import Tuning  # noqa: E402
from ternc.eval import compare_logits, score_text  # noqa: E402
from ternc.modules.linear import TernaryLinear  # noqa: E402

RECORD = "quality_lm.json"


@dataclasses.dataclass
class Run:
    """What every row needs."""

    options: argparse.Namespace
    settings: Settings
    model: nn.Module
    corpus: bytes
    """The training text."""
    batches: list[torch.Tensor]
    texts: dict[str, str]
    judged: list[torch.Tensor]
    """Batches of windows of the validation text: predictions are compared there."""
    kept: Path
    """Fits, which tuning finds again: its seconds come on top."""

    @property
    def device(self) -> str:
        return self.options.device


Made = tuple[nn.Module, float]
"""A model, and the bits of a quantised weight, scales included."""


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    settings = Settings.smoke() if options.smoke else Settings()
    if options.seconds is not None:
        settings = dataclasses.replace(settings, seconds=options.seconds)
    result, failed = run_all(options, settings)
    print(table(result))
    return 1 if failed else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train and valid")
    parser.add_argument("--also", type=Path, action="append", default=[], help="score on this too")
    parser.add_argument("--out", type=Path, required=True, help="model, record and table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=None, help="of training")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after these")
    parser.add_argument("--sequences", type=int, default=None, help="windows to calibrate on")
    parser.add_argument("--bytes", type=int, default=None, help="of each text that is scored")
    parser.add_argument("--only", action="append", help="this row, as 'ternc 2'; more than once")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds in all")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    return parser.parse_args(arguments)


def run_all(options: argparse.Namespace, settings: Settings) -> tuple[dict, list[str]]:
    """Trains or loads the model, then makes every row that is not there yet; those that failed."""
    start, failed = time.monotonic(), []
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = join(options.data / "train")
    model, result = float_model(options, settings, corpus)
    texts = {"valid": join(options.data / "valid")[: options.bytes].decode(errors="replace")}
    for path in options.also:
        texts[path.stem] = path.read_bytes()[: options.bytes].decode(errors="replace")
    with tempfile.TemporaryDirectory() as kept:
        batches = windows(corpus, options.sequences or settings.sequences, options, settings)
        judged = windows(texts["valid"].encode(), settings.judged_sequences, options, settings)
        run = Run(options, settings, model, corpus, batches, texts, judged, Path(kept))
        for name, planes, make in variants(run):
            key = f"{name} {planes}".strip()
            if key in result["rows"] or (options.only and key not in options.only):
                continue
            if time.monotonic() - start > 60 * options.minutes:
                say(f"no time left for {key}")
                continue
            say(key)
            try:
                result["rows"][key] = row(run, name, planes, make) | {"commit": options.commit}
            except Exception:  # the rows after it can still be made
                say(f"{key} failed:\n{traceback.format_exc()}")
                failed.append(key)
                continue
            say(json.dumps(result["rows"][key]))
            write(options.out, result)
    return result, failed


def float_model(
    options: argparse.Namespace, settings: Settings, corpus: bytes
) -> tuple[nn.Module, dict]:
    """The trained model, its weights bf16 numbers held in fp32, and the record so far."""
    path = options.out / RECORD
    model = new_model(settings).to(options.device)
    if path.exists():
        result = json.loads(path.read_text())
        if result["settings"] != dataclasses.asdict(settings):
            raise SystemExit(f"{path} is of other settings; give another --out")
        return load_model(model, options.out), result
    say("training")
    facts = train(model, corpus, settings, compiled=not options.eager, say=say)
    save_model(model, options.out)
    load_model(model, options.out)
    device = torch.cuda.get_device_name() if "cuda" in options.device else "CPU"
    result = {
        "settings": dataclasses.asdict(settings),
        "training": facts,
        "device": device,
        "torch": torch.__version__,
        "rows": {},
    }
    write(options.out, result)
    return model, result


def windows(
    corpus: bytes, count: int, options: argparse.Namespace, settings: Settings
) -> list[torch.Tensor]:
    """Batches of `count` windows of the training text, at even distances."""
    length = settings.context
    text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
    starts = torch.arange(count) * (len(text) - length) // max(count - 1, 1)
    found = text[starts[:, None] + torch.arange(length)].long().to(options.device)
    # A batch holds windows of the whole text: one batch in eight is kept for judging.
    step = max(1, count // settings.calibration_batch)
    return [found[start::step] for start in range(step)]


def variants(run: Run) -> Iterator[tuple[str, int | str, Callable[[], Made]]]:
    """(method, planes or bits, function that makes the model); what matters most comes first."""
    yield "float", "", lambda: (run.model, 16.0)
    for planes in (2, 1):
        yield "ternc", planes, lambda k=planes: ours(run, k)
        yield "ternc + tuning", planes, lambda k=planes: ours(run, k, tuned=True)
    yield "ternc", 3, lambda: ours(run, 3)
    for bits in (3, 4):
        yield "int gptq", bits, in_place(run, gptq, bits, bits + (16 + bits) / GROUP)
    for planes in (1, 2, 3):
        yield "greedy", planes, plain(run, lambda w, k=planes: greedy(w, k), 1.6 * planes)
    for bits in (3, 4):
        rule = functools.partial(integer, bits=bits)
        yield "int rounding", bits, plain(run, rule, bits + (16 + bits) / GROUP)
    yield "absmean", 1, plain(run, lambda w: absmean(w, 1), 1.6 + 16 / GROUP)
    yield "ternc + reconstruction", 1, lambda: ours(run, 1, reconstructed=True)
    for planes in (1, 2, 3):
        bits = planes * (1.6 + 16 / GROUP)
        yield "reference stack", planes, in_place(run, reference_stack, planes, bits)
    for planes in (1, 2, 3):
        yield "ternc rtn, no data", planes, lambda k=planes: without_data(run, k)
    for planes in (1, 2, 3):
        yield "ternc, free scales", planes, lambda k=planes: ours(run, k, tied=False)
    yield "ternc + tuning", 3, lambda: ours(run, 3, tuned=True)


def in_place(run: Run, method: Callable[..., nn.Module], number: int, bits: float):
    """A copy of the model, changed by a method that is calibrated."""
    return lambda: (method(copy.deepcopy(run.model), run.batches, number), bits)


def plain(run: Run, rule: Callable[[torch.Tensor], torch.Tensor], bits: float):
    """Float weights rounded by `rule`."""
    return lambda: (replace_weights(copy.deepcopy(run.model), rule), bits)


def ours(
    run: Run, planes: int, *, tuned: bool = False, reconstructed: bool = False, tied: bool = True
) -> Made:
    """ternc's model; the fits of a plane count are made once."""
    config = ternc.Config(planes=planes, activation_bits=None, tie_scales=tied)
    made = ternc.quantize(
        run.model, config, calibration=run.batches, loss=kl_of_tensors,
        tuning=Tuning(epochs=run.settings.tuning_epochs) if tuned else None,
        resume=run.kept / f"{planes}{'' if tied else ' free'}",
    )  # fmt: skip
    if reconstructed:
        settings = run.settings
        more = windows(run.corpus, settings.reconstruction_sequences, run.options, settings)
        autocast = "bfloat16" if "cuda" in run.device else None
        plan = Reconstruction(steps=settings.reconstruction_steps, autocast=autocast)
        (window,) = reconstruct(made, run.model, more, kl_of_tensors, plan)
        say(f"held-out KL {window.before:.4f} -> {window.after:.4f}")
    return reloaded(run, made)


def without_data(run: Run, planes: int) -> Made:
    """ternc's closed form: rounding alone."""
    config = ternc.Config(planes=planes, method="rtn", activation_bits=None)
    return reloaded(run, ternc.quantize(run.model, config))


def reloaded(run: Run, made: nn.Module) -> Made:
    """The model, saved and loaded into a fresh one; bits at rest."""
    rows = ternc.report(made).rewritten
    bits = 8 * sum(r.bytes_at_rest for r in rows) / sum(r.shape[0] * r.shape[1] for r in rows)
    with tempfile.TemporaryDirectory() as folder:
        ternc.save(made, folder)
        return ternc.load(folder, model=new_model(run.settings).to(run.device)).eval(), bits


def kl_of_tensors(output: torch.Tensor, target: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """KL(float || quantised) of logits that are a plain tensor, in nats a byte."""
    return kl_divergence(output.flatten(0, 1), target.flatten(0, 1)).mean()


def row(run: Run, name: str, planes: int | str, make: Callable[[], Made]) -> dict:
    """One row: made, scored with floating-point activations, then with int8 ones."""
    start = time.monotonic()
    model, bits = make()
    made = time.monotonic()
    found = {"method": name, "planes": planes, "bits": bits}
    count = sum(p.numel() for p in run.model.parameters())
    quantised = sum(m.weight.numel() for m in linears(run.model).values())
    found["bits_of_the_model"] = (bits * quantised + 16 * (count - quantised)) / count
    found["bits_per_byte"] = score(run, model)
    with torch.autocast("cuda", torch.bfloat16, enabled="cuda" in run.device):
        agreement = compare_logits(model, run.model, run.judged)
    found |= {"kl": agreement.kl, "top1": agreement.top1}
    packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    for layer in packed:
        layer.activation_bits = 8
    found["bits_per_byte_int8"] = score(run, model) if packed else None
    return found | {"seconds": made - start, "scoring_seconds": time.monotonic() - made}


def score(run: Run, model: nn.Module) -> dict[str, float]:
    """Bits per byte on every text; products in bf16 on a GPU, as in training."""
    context = run.settings.context
    with torch.autocast("cuda", torch.bfloat16, enabled="cuda" in run.device):
        return {
            name: score_text(
                model, text, context=context, batch=run.settings.scored_batch
            ).to_dict()["bits_per_byte"]
            for name, text in run.texts.items()
        }


def join(folder: Path) -> bytes:
    """The text files of a folder, in the order of their names."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    if not paths:
        raise SystemExit(f"{folder} holds no text")
    return b"\n".join(path.read_bytes() for path in paths)


def write(out: Path, result: dict) -> None:
    """Record and table, each whole or not at all."""
    for name, text in ((RECORD, json.dumps(result, indent=1)), ("quality_lm.md", table(result))):
        staged = out / f".{name}"
        staged.write_text(text + "\n")
        os.replace(staged, out / name)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
