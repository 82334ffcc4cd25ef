"""`ternc explain MODEL_DIR`: what the compiler would do to each layer, and why. Changes nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from ternc.cli.console import add_config_options, add_json_option, config_of, print_json, say
from ternc.policy import OFFLINE_ONLY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc explain`."""
    parser.add_argument("model", type=Path, metavar="HF_MODEL_DIR", help="folder with config.json")
    add_config_options(parser, without=list(OFFLINE_ONLY))
    add_json_option(parser)
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as one HTML page"
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="memory bandwidth that the page sets the kernels against (default: unknown)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Print the report of a dry run."""
    import torch

    import ternc
    from ternc.cli.huggingface import example_inputs, load_folder

    config = config_of(namespace)
    say(f"loading {namespace.model}")
    model = load_folder(namespace.model)
    say("tracing and fitting")
    with torch.inference_mode():
        report = ternc.explain(model, config=config, **example_inputs(model))
    if namespace.html:
        bandwidth = namespace.bandwidth and 1e9 * namespace.bandwidth
        report.to_html(namespace.html, title=namespace.model.resolve().name, bandwidth=bandwidth)
        say(f"wrote {namespace.html}")
    if namespace.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 0
