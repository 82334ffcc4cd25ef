"""`ternc quantize MODEL_DIR -o OUT`: float weights in, packed ternary weights out (safetensors)."""

from __future__ import annotations

import argparse
from pathlib import Path

from ternc.cli.console import add_config_options, add_json_option, config_of, print_json, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc quantize`."""
    parser.add_argument("model", type=Path, metavar="HF_MODEL_DIR", help="folder with config.json")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write"
    )
    add_config_options(parser)
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Write the folder, then print the report."""
    import ternc
    from ternc.cli.huggingface import copy_side_files, load_model

    config = config_of(namespace)
    say(f"loading {namespace.model}")
    model = load_model(namespace.model)
    say("quantizing")
    quantized = ternc.quantize(model, config, inplace=True)
    ternc.save(quantized, namespace.output)
    copied = copy_side_files(namespace.model, namespace.output)
    say(f"wrote {namespace.output}" + (f" (with {', '.join(copied)})" if copied else ""))
    report = ternc.report(quantized)
    if namespace.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 0
