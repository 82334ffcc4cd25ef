"""The `ternc` command: one file a subcommand; exit status 0 done, 1 error, 2 usage."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ternc.errors import TerncError

COMMANDS = {
    "demo": "train a small language model, rewrite it, compile it, measure it",
    "explain": "say what the compiler would do to a model, and why",
    "quantize": "write a Hugging Face model folder with packed ternary weights",
    "train": "train a float language model until its weights are ternary, and pack it",
    "eval": "perplexity and bits per byte of a model on text, and its distance to the float model",
    "generate": "continue a prompt with a language model, packed or float",
    "export": "write a packed model as a file for llama.cpp, torch.export or transformers",
    "bench": "time a model or a layer: floating point, Inductor and ternc, in turn",
    "info": "torch, processor, GPU and the kernels available here",
}
"""Subcommand -> its line of help; the code is in ternc/cli/<name>.py."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ternc <command> ...`; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="ternc", description="The ternary compiler for PyTorch.")
    parser.add_argument("--version", action="version", version=f"ternc {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name == chosen:
            module = importlib.import_module(f"ternc.cli.{name}")
            module.add_arguments(command)
    namespace = parser.parse_args(arguments)
    try:
        status = module.run(namespace)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has closed it; Python would write to it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (TerncError, OSError) as error:
        print(f"ternc: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _version() -> str:
    import ternc

    return ternc.__version__
