"""Results of the ablation -> a Markdown table, a plot, one JSON file."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from ablation_data import TUNE
from ablation_plan import PTQ, RATED, best, recipes

SCORED = "valid"
"""The text of the headline: never used to choose anything."""


def chosen(results: dict[str, dict]) -> dict[str, dict]:
    """Arm -> its result at the first seed, at the rate that is best on the tuning text."""
    seed = min((result["seed"] for result in results.values()), default=0)
    found = {arm: best(results, arm, seed) for arm in [*recipes(), *PTQ]}
    return {arm: result for arm, result in found.items() if result is not None}


def per_seed(results: dict[str, dict], arm: str) -> dict[int, dict]:
    """Seed -> the arm's result at the rate that is best on the tuning text."""
    seeds = sorted({result["seed"] for result in results.values()})
    found = {seed: best(results, arm, seed) for seed in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def seed_deviation(results: dict[str, dict]) -> float | None:
    """Pooled standard deviation between seeds of the arms that have more than one."""
    squares, freedom = 0.0, 0
    for arm in RATED:
        scores = [result["bits_per_byte"][SCORED] for result in per_seed(results, arm).values()]
        if len(scores) > 1:
            squares += statistics.variance(scores) * (len(scores) - 1)
            freedom += len(scores) - 1
    return math.sqrt(squares / freedom) if freedom else None


def table(results: dict[str, dict]) -> str:
    """Markdown: each arm, its gap to float, share of BitNet's closed, place to `full`."""
    arms = chosen(results)
    if not arms:
        return "no result yet"
    columns = [name for name in next(iter(arms.values()))["bits_per_byte"] if name != TUNE]
    base, other, full = (
        arms[name]["bits_per_byte"][SCORED] if name in arms else math.nan
        for name in ("float", "bitnet", "full")
    )
    heads = ["arm", "rate", *columns, "gap to float", "of BitNet's gap closed", "against full"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, result in arms.items():
        scores = result["bits_per_byte"]
        gap = scores[SCORED] - base
        closed = 1 - gap / (other - base) if other != base else math.nan
        cells = [arm, f"{result['rate']:g}", *(f"{scores[name]:.4f}" for name in columns)]
        cells += [f"{gap:+.4f}", f"{closed:.0%}", f"{scores[SCORED] - full:+.4f}"]
        lines.append("| " + " | ".join(cells).replace("nan%", "-").replace("+nan", "-") + " |")
    lines += ["", *_notes(results)]
    return "\n".join(lines)


def _notes(results: dict[str, dict]) -> list[str]:
    lines = []
    for arm in RATED:
        found = per_seed(results, arm)
        if len(found) > 1:
            scores = [result["bits_per_byte"][SCORED] for result in found.values()]
            listed = ", ".join(f"{score:.4f}" for score in scores)
            lines.append(
                f"{arm}, seeds {sorted(found)}: {listed}; mean {statistics.mean(scores):.4f}."
            )
    if (deviation := seed_deviation(results)) is not None:
        lines.append(f"Pooled standard deviation between seeds: {deviation:.4f}.")
    for arm in RATED:
        rates = {r["rate"]: r["bits_per_byte"][TUNE] for r in _first_seed(results, arm)}
        if len(rates) > 1:
            listed = ", ".join(f"{rate:g}: {rates[rate]:.4f}" for rate in sorted(rates))
            lines.append(f"{arm}, learning rate: bits per byte on the tuning text: {listed}.")
    return lines


def _first_seed(results: dict[str, dict], arm: str) -> list[dict]:
    found = [result for result in results.values() if result["arm"] == arm]
    first = min((result["seed"] for result in found), default=0)
    return [result for result in found if result["seed"] == first]


def plot(results: dict[str, dict], path: Path) -> None:
    """PNG: bits per byte of every arm, and the training losses of float, BitNet and full."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = chosen(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.32 * len(arms) + 1.8))
    shown = [arm for arm in arms if arm not in PTQ]
    scores = [arms[arm]["bits_per_byte"][SCORED] for arm in shown]
    deviation = seed_deviation(results)
    for arm, value in zip(shown, scores, strict=True):
        colour = "#0072b2" if arm in RATED else "#777777"
        left.errorbar(value, arm, xerr=2 * deviation if deviation else None, fmt="o", color=colour)
    left.invert_yaxis()
    left.grid(axis="y", color="#dddddd", lw=0.6)
    left.set_xlabel("bits per byte, held-out books (bars: 2 deviations of seeds)")
    for arm, colour in zip(RATED, ("#0072b2", "#d55e00", "#009e73"), strict=True):
        if arm in arms:
            steps, losses = zip(*arms[arm]["losses"], strict=True)
            right.plot(steps, [loss / math.log(2) for loss in losses], color=colour, label=arm)
    right.set_xlabel("step")
    right.set_ylabel("bits per byte, training batch")
    right.set_ylim(top=right.get_lines()[0].get_ydata()[2] if right.get_lines() else None)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _heading(results: dict[str, dict]) -> list[str]:
    """What was run, on what, and what was not."""
    trained = [result for result in results.values() if "steps" in result]
    steps = sorted({result["steps"] for result in trained})
    bytes_seen = sorted({result["bytes"] / 1e6 for result in trained})
    devices = ", ".join(sorted({f"{r['device']}, torch {r['torch']}" for r in results.values()}))
    late = sum(result["graphs_compiled_after_first_row"] for result in trained)
    missing = [arm for arm in [*recipes(), *PTQ] if arm not in chosen(results)]
    return [
        "# Training ablation",
        "",
        "Byte-level decoder of 25 M weights, trained from scratch on books; bits per byte of the",
        "packed models (float ones as they are) on books and text not trained on, first seed. The",
        "teacher is the best float arm, its training not counted. Rates are chosen on a part that",
        "is not scored.",
        "",
        f"Steps of every arm: {steps}; million bytes: {[round(value, 1) for value in bytes_seen]}. "
        f"On {devices}.",
        f"Graphs compiled after an arm's first logged steps, all arms together: {late}.",
        f"Not run: {', '.join(missing) or 'nothing'}.",
    ]


def _timings(timings: dict[str, dict]) -> list[str]:
    """A line for each measurement of steps."""
    lines = []
    for found in timings.values():
        own = ", ".join(
            f"{arm} {value:.1f} ms ({found['ratio_to_float'][arm]:.2f} of float)"
            for arm, value in found["milliseconds"].items()
        )
        lines.append(
            f"A step of {found['bytes_per_step']} bytes, {found['compiled']} compiled, teacher not "
            f"included: {own}; the teacher's forward "
            f"{found['teacher_forward_milliseconds']:.1f} ms. {found['device']}, torch "
            f"{found['torch']}."
        )
    return lines


def write(results: dict[str, dict], folder: Path, extra: dict[str, object]) -> None:
    """ablation.json, ablation.png and the table in ablation.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.json").write_text(
        json.dumps({**extra, "results": results}, indent=1) + "\n"
    )
    page = [*_heading(results), "", table(results), "", *_timings(extra.get("timings", {}))]
    (folder / "ablation.md").write_text("\n".join(page).rstrip() + "\n")
    plot(results, folder / "ablation.png")
