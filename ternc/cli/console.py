"""What every subcommand shares: options for the configuration, progress, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ternc.cli.options import add_options, settings_of
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
    """Every field of `Config`."""
    add_options(parser, Config)


def config_of(namespace: argparse.Namespace) -> Config:
    """The configuration that the options ask for. Raises ConfigError for a bad value."""
    return settings_of(namespace, Config)
