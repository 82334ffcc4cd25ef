"""`ternc export MODEL_DIR --to gguf|pt2|bitnet -o FILE`: packed weights for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ternc.cli.console import add_device_option, add_json_option, print_json, say
from ternc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc export`."""
    from ternc.export import TARGETS
    from ternc.export.blocks import TRITS

    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="written by ternc quantize or ternc train")
    add("--to", choices=TARGETS, required=True, help="llama.cpp, torch.export, or transformers")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="file; folder for bitnet")
    add("--trits", choices=list(TRITS), help="gguf: type of weights of one plane (TQ2_0)")
    add(
        "--round-scales",
        action="store_true",
        help="gguf: round scales to fp16 (1 part in 2,048) where a smaller type then fits",
    )
    add("--no-tokenizer", action="store_true", help="gguf: llama.cpp is given token ids")
    add_device_option(parser, None, why="pt2, where the file will run")
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Write the file; print what is in it."""
    from ternc.cli.huggingface import copy_side_files, is_packed, load_folder, tokenizer_of
    from ternc.export import export

    options = _options(namespace)
    if not is_packed(namespace.model):
        raise InputError(
            f"{namespace.model} holds no packed model; make one with ternc quantize "
            f"{namespace.model} -o OUT"
        )
    say(f"loading {namespace.model}")
    model = load_folder(namespace.model).to(namespace.device or "cpu")
    if namespace.to == "pt2":
        options["inputs"] = _inputs(model, namespace.device or "cpu")
    if namespace.to == "gguf" and not options.pop("no_tokenizer", False):
        options["tokenizer"] = tokenizer_of(namespace.model)
    written = export(model, namespace.to, namespace.output, **options)
    if namespace.to == "bitnet":
        copy_side_files(namespace.model, namespace.output)
    if namespace.json:
        print_json(written)
    else:
        for name, value in written.items():
            print(f"{name}: {_written(value)}")
    say(f"wrote {namespace.output}")
    return 0


def _options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Options of the target. Raises InputError for one of another target."""
    found: dict[str, Any] = {}
    targets = {"trits": "gguf", "round_scales": "gguf", "no_tokenizer": "gguf", "device": "pt2"}
    for name, target in targets.items():
        value = getattr(namespace, name)
        if value and namespace.to != target:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is an option of --to {target}, not of {namespace.to}")
        if value and target == "gguf":
            found[name] = value
    return found


def _written(value: Any) -> str:
    """A fact; several by name as `input_ids [s0, s1], attention_mask [s0, s1]`."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} {fact}" for name, fact in value.items()).replace("'", "")


def _inputs(model: Any, device: str) -> dict[str, Any]:
    from ternc.cli.huggingface import example_inputs

    return {name: value.to(device) for name, value in example_inputs(model).items()}
