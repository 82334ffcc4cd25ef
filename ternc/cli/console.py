"""What every subcommand shares: options for the configuration, progress, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ternc.config import Config


def say(line: str) -> None:
    """A line of progress, on stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The result as JSON on stdout."""
    print(json.dumps(value, indent=1))


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `Config` that a command line sets."""
    parser.add_argument(
        "--planes", type=_planes, default="auto", help="trit planes: 1, 2, 3 or auto (default)"
    )
    parser.add_argument(
        "--group-size",
        type=_group_size,
        default=128,
        help="input columns that share a multiplier: a number, row or tensor (default 128)",
    )
    parser.add_argument(
        "--activation-bits",
        type=_activation_bits,
        default=8,
        help="8 (default), 4 or none (floating point)",
    )
    parser.add_argument(
        "--error-budget",
        type=float,
        default=Config.error_budget,
        help=f"relative weight error for --planes auto (default {Config.error_budget})",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="GLOB",
        help="layer names to leave in floating point; may be repeated; replaces the default "
        + " ".join(Config.exclude),
    )


def config_of(namespace: argparse.Namespace) -> Config:
    """The configuration that the options ask for. Raises ConfigError for a bad value."""
    return Config(
        planes=namespace.planes,
        group_size=namespace.group_size,
        activation_bits=namespace.activation_bits,
        error_budget=namespace.error_budget,
        exclude=Config.exclude if namespace.exclude is None else tuple(namespace.exclude),
    )


def _planes(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)


def _group_size(text: str) -> int | str | None:
    return None if text == "row" else "tensor" if text == "tensor" else int(text)


def _activation_bits(text: str) -> int | None:
    return None if text == "none" else int(text)
