"""`ternc demo`: train a small byte-level language model, rewrite it, compile it, measure it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

from ternc.cli.console import add_json_option, print_json, say
from ternc.demo.run import Outcome, Settings, run_demo
from ternc.reporting import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc demo`."""
    parser.add_argument(
        "--seconds", type=float, default=None, help=f"training time ({Settings.seconds:.0f})"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    parser.add_argument(
        "--quick", action="store_true", help="the flow only, in seconds: tiny model, no Inductor"
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Exit status 1 when a rewritten layer did not run a kernel."""
    settings = Settings.quick(namespace.seed) if namespace.quick else Settings(seed=namespace.seed)
    if namespace.seconds is not None:
        settings = dataclasses.replace(settings, seconds=namespace.seconds)
    start = time.monotonic()
    outcome = run_demo(settings, say)
    say(f"done in {time.monotonic() - start:.0f} s")
    if namespace.json:
        print_json(outcome.to_dict())
    else:
        print(describe(outcome))
    if rows := outcome.on_reference:
        names = ", ".join(sorted({row.name for row in rows}))
        print(
            f"ternc: error: no kernel ran {names}, only the eager reference; `ternc info` says why",
            file=sys.stderr,
        )
        return 1
    return 0


def describe(outcome: Outcome) -> str:
    """The report of the quantised model, then quality, size and speed of every variant."""
    import tabulate

    context = outcome.settings.context
    rows = [
        (
            variant.name,
            f"{variant.bits_per_byte:.3f}",
            format_bytes(variant.bytes),
            f"{1 / variant.decode:,.0f}",
            f"{context / variant.prefill:,.0f}",
        )
        for variant in outcome.variants
    ]
    headers = (
        "variant",
        "bits per byte",
        "model in memory",
        "tokens/s, one at a time",
        f"tokens/s, {context} at once",
    )
    table = tabulate.tabulate(
        rows, headers, tablefmt="simple", colalign=("left",) + ("right",) * 4, disable_numparse=True
    )
    return "\n\n".join(
        (
            str(outcome.reports["ternc planes=auto"]),
            f"Quality on {outcome.settings.windows} windows of {context} bytes that were not "
            f"trained on ({outcome.steps} training steps); speed at batch 1, median:",
            table,
        )
    )
