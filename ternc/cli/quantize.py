"""`ternc quantize MODEL_DIR -o OUT`: float weights in, packed ternary weights out (safetensors)."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ternc.cli.console import add_config_options, add_json_option, config_of, print_json, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc quantize`."""
    parser.add_argument("model", type=Path, metavar="HF_MODEL_DIR", help="folder with config.json")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write"
    )
    add_config_options(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 text: fit every layer to the inputs that it gets on it",
    )
    parser.add_argument(
        "--sequences", type=int, default=128, help="of the text, evenly spaced (default 128)"
    )
    parser.add_argument(
        "--context", type=int, default=512, help="tokens of a sequence at most (default 512)"
    )
    parser.add_argument(
        "--bits-budget", type=float, help="mean bits of a weight, for --planes auto"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep fitted layers here; go on if some are there",
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Write the folder, then print the report."""
    import ternc
    from ternc.cli.huggingface import copy_side_files, load_model, text_batches, tokenizer_of

    config = dataclasses.replace(config_of(namespace), bits_budget=namespace.bits_budget)
    say(f"loading {namespace.model}")
    model = load_model(namespace.model)
    batches = None
    if namespace.calibration is not None:
        text = namespace.calibration.read_bytes().decode("utf-8", errors="ignore")
        tokenizer = tokenizer_of(namespace.model)
        batches = text_batches(model, tokenizer, text, namespace.sequences, namespace.context)
    say("quantizing")
    quantized = ternc.quantize(
        model, config, calibration=batches, resume=namespace.resume, inplace=True
    )
    ternc.save(quantized, namespace.output)
    copied = copy_side_files(namespace.model, namespace.output)
    say(f"wrote {namespace.output}" + (f" (with {', '.join(copied)})" if copied else ""))
    report = ternc.report(quantized)
    if namespace.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 0
