"""The record of quality_lm.py -> its table, and what the goals say."""

from __future__ import annotations

import tabulate
from quality_baselines import at_bits

GOALS = {1: 0.25, 2: 0.015, 3: 0.002}
"""Planes -> bits per byte that the full stack may lose."""
GOAL_RECONSTRUCTED = 0.12
"""The same for one plane with reconstructed blocks."""


def table(result: dict) -> str:
    """Markdown: one row a variant, its loss of bits per byte, and what the goals say."""
    rows = result["rows"]
    if "float" not in rows:
        return "no row yet"
    base = rows["float"]["bits_per_byte"]
    cells = []
    for found in rows.values():
        numbers = [f"{found['bits']:.2f}", f"{found['bits_of_the_model']:.2f}"]
        for text, wanted in base.items():
            score = found["bits_per_byte"][text]
            numbers += [f"{score:.4f}", f"{score - wanted:+.4f}"]
            int8 = found["bits_per_byte_int8"]
            numbers.append("-" if int8 is None else f"{int8[text] - wanted:+.4f}")
        known = found.get("kl") is not None
        numbers += [f"{found['kl']:.4f}", f"{found['top1']:.4f}"] if known else ["-", "-"]
        cells.append((found["method"], found["planes"], *numbers, f"{found['seconds']:.0f}"))
    columns = [c for text in base for c in (text, "loss", "loss a8")]
    headers = ("method", "planes / bits", "bits", "model", *columns, "KL", "top 1", "s")
    text = tabulate.tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    facts = result["training"]
    return (
        f"{text}\n\nBits per byte; KL(float || model) in nats a byte, and the share of bytes with "
        "the same likeliest next one, on the first text. "
        f"{facts['parameters'] / 1e6:.1f} M parameters, "
        f"{facts['bytes'] / 1e6:.0f} MB read in {facts['steps']} steps and "
        f"{facts['seconds']:.0f} s; {result['device']}, torch {result['torch']}.\n{goals(result)}"
    )


def goals(result: dict) -> str:
    """What the full stack loses on the validation text, against what it may lose."""
    rows, lines = result["rows"], []
    wanted = [
        (f"{name} {planes}", goal)
        for planes, goal in sorted(GOALS.items())
        for name in ("ternc", "ternc + tuning")
    ]
    wanted.append(("ternc + reconstruction 1", GOAL_RECONSTRUCTED))
    for key, goal in wanted:
        if key in rows:
            loss = rows[key]["bits_per_byte"]["valid"] - rows["float"]["bits_per_byte"]["valid"]
            lines.append(f"{key}: {loss:+.4f}, at most {goal:+.3f} wanted.")
    return "\n".join(lines + at_equal_bits(rows) + against_the_stack(rows))


def at_equal_bits(rows: dict) -> list[str]:
    """ternc against the integers with error compensation, interpolated in log loss at its bits."""
    points = [rows.get(f"int gptq {bits}") for bits in (3, 4)]
    lines = []
    for planes in (2, 3):
        ours = rows.get(f"ternc + tuning {planes}") or rows.get(f"ternc {planes}")
        if ours is None or None in points:
            continue
        base = rows["float"]["bits_per_byte"]["valid"]
        losses = [point["bits_per_byte"]["valid"] - base for point in points]
        if min(losses) <= 0:
            continue
        pairs = [(point["bits"], loss) for point, loss in zip(points, losses, strict=True)]
        there = at_bits(pairs, ours["bits"])
        loss = ours["bits_per_byte"]["valid"] - base
        lines.append(
            f"{planes} planes at {ours['bits']:.2f} bits: {loss:+.4f}; int gptq there, in log "
            f"loss between (or beyond) 3 and 4 bits: {there:+.4f}."
        )
    return lines


def against_the_stack(rows: dict) -> list[str]:
    """What is lost of the text and of the float model's predictions, beside the reference stack."""
    lines = []
    for planes in (1, 2, 3):
        theirs = rows.get(f"reference stack {planes}")
        for name in ("ternc", "ternc + tuning", "ternc + reconstruction"):
            ours = rows.get(f"{name} {planes}")
            if ours is None or theirs is None:
                continue
            base = rows["float"]["bits_per_byte"]
            losses = [
                f"{text} {ours['bits_per_byte'][text] - base[text]:+.4f} against "
                f"{theirs['bits_per_byte'][text] - base[text]:+.4f}"
                for text in base
            ]
            if ours.get("kl") is not None and theirs.get("kl") is not None:
                losses.append(f"KL {ours['kl']:.4f} against {theirs['kl']:.4f}")
            lines.append(
                f"{name} {planes} at {ours['bits']:.2f} bits, reference stack at "
                f"{theirs['bits']:.2f}: {', '.join(losses)}."
            )
    return lines
