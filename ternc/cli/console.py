"""What every subcommand shares: options for the configuration, progress, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ternc.cli.options import add_options, settings_of
from ternc.config import Config


def say(line: str) -> None:
    """A line of progress, on stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The result as JSON on stdout."""
    print(json.dumps(value, indent=1))


def counted(count: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def text_file(text: str) -> Path:
    """An option's file. Raises ArgumentTypeError where there is none, before a model is loaded."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return path


def add_device_option(
    parser: argparse.ArgumentParser, default: str | None = "cpu", why: str = ""
) -> None:
    """--device; `default` "best" is cuda where there is one."""
    if default == "best":
        default, said = "cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda"
    else:
        said = "cpu (default) or cuda"
    line = f"{why}: {said}" if why else said
    parser.add_argument("--device", type=_device, default=default, help=line)


def _device(text: str) -> str:
    """A device that is here."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda (or cuda:1, ...)")
    here = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= here:
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {counted(here, 'CUDA device')}")
    return text


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_config_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Every field of `Config` but those in `without`."""
    add_options(parser, Config, without=without)


def config_of(namespace: argparse.Namespace) -> Config:
    """The configuration that the options ask for. Raises ConfigError for a bad value."""
    return settings_of(namespace, Config)
