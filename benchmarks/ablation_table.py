"""Results of the ablation -> a Markdown table, a plot, one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

from ablation_data import TUNE
from ablation_plan import LONGER, PTQ, RATED, SHIPPED, best, recipes

SCORED = "valid"
"""The text of the headline: never used to choose anything."""


@dataclasses.dataclass(frozen=True)
class Switch:
    """A technique: the arm that has it, and the same recipe without."""

    name: str
    on: str
    off: str


SWITCHES = (
    Switch("KL from the float teacher", "full", "full-kl"),
    Switch("the same, no dead-zone bias (the presets)", "full-dead_zone", "warm_start"),
    Switch("warm start and ramp, with a teacher", "full", "full-ramp"),
    Switch("warm start and ramp, no teacher", "warm_start", "modern"),
    Switch("dead-zone bias, with a teacher", "full", "full-dead_zone"),
    Switch("dead-zone bias, no teacher", "full-kl", "warm_start"),
    Switch("KL, the student floating point too", "float+kl", "float"),
    Switch("KL, on BitNet b1.58", "bitnet+kl", "bitnet"),
    Switch("warm start and ramp, on BitNet b1.58 with KL", "bitnet+kl+ramp", "bitnet+kl"),
    Switch("groups of 128, flat rate with warm-down, no decay", "modern", "bitnet"),
    Switch("stages 8, 4, 2, 1.58 instead of the ramp (MPQ)", "full+stages", "full"),
    Switch("Hadamard transform (AHT-LP)", "full+hadamard", "full"),
    Switch("gradient alignment, logits (GAKD)", "full+gradient", "full"),
    Switch("gradient alignment, weights (GAKD)", "full+hvp", "full"),
    Switch("features (GAKD)", "full+feature", "full"),
    Switch("regularisation to the quantiser (DR-QAP)", "full+penalty", "full"),
    Switch("the same, 300,000 times as strong", "full+strong_penalty", "full"),
    Switch("gradient momentum (ESTE-M)", "full+momentum", "full"),
    Switch("Muon for matrices", "full+muon", "full"),
)
"""Left out where an arm was not run."""


def chosen(results: dict[str, dict]) -> dict[str, dict]:
    """Arm -> its result at the first seed, at the rate that is best on the tuning text."""
    seed = min((result["seed"] for result in results.values()), default=0)
    found = {arm: best(results, arm, seed) for arm in [*recipes(), *PTQ]}
    return {arm: result for arm, result in found.items() if result is not None}


def per_seed(results: dict[str, dict], arm: str, rate: float | None = None) -> dict[int, dict]:
    """Seed -> the arm's result at a rate; None = the one that is best at the first seed."""
    if rate is None:
        rate = chosen(results)[arm]["rate"] if arm in chosen(results) else None
    found = [r for r in results.values() if r["arm"] == arm and r["rate"] == rate]
    return {result["seed"]: result for result in sorted(found, key=lambda r: r["seed"])}


def seed_deviation(results: dict[str, dict], text: str = SCORED) -> float | None:
    """Pooled standard deviation between seeds of the arms that have more than one."""
    squares, freedom = 0.0, 0
    for arm in recipes():
        scores = [result["bits_per_byte"][text] for result in per_seed(results, arm).values()]
        if len(scores) > 1:
            squares += statistics.variance(scores) * (len(scores) - 1)
            freedom += len(scores) - 1
    return math.sqrt(squares / freedom) if freedom else None


def score(
    results: dict[str, dict], arm: str, text: str = SCORED, rate: float | None = None
) -> float:
    """Mean over an arm's seeds of bits per byte; nan where it was not run."""
    found = per_seed(results, arm, rate).values()
    return statistics.fmean(r["bits_per_byte"][text] for r in found) if found else math.nan


def table(results: dict[str, dict]) -> str:
    """Markdown: each arm, its gap to float and share of BitNet's closed; then every switch."""
    arms = chosen(results)
    if not arms:
        return "no result yet"
    columns = [name for name in next(iter(arms.values()))["bits_per_byte"] if name != TUNE]
    base, other = (score(results, name) for name in ("float", "bitnet"))
    heads = ["arm", "preset", "rate", "seeds", *columns, "gap to float", "of BitNet's gap closed"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, result in arms.items():
        gap = score(results, arm) - base
        closed = 1 - gap / (other - base) if other != base else math.nan
        preset = f"`{SHIPPED[arm]}`" if arm in SHIPPED else ""
        cells = [arm, preset, f"{result['rate']:g}", str(len(per_seed(results, arm)))]
        cells += [f"{score(results, arm, name):.4f}" for name in columns]
        cells += [f"{gap:+.4f}", f"{closed:.0%}"]
        lines.append("| " + " | ".join(cells).replace("nan%", "-").replace("+nan", "-") + " |")
    lines += ["", *_switches(results), *_notes(results)]
    return "\n".join(lines)


def effect(results: dict[str, dict], switch: Switch) -> float:
    """Bits per byte that a switch adds, by means of seeds; less than 0 is a gain.

    Both at the rate of the one that was not tried at several. Equal seeds are not paired: runs of
    one seed part as far as those of two do.
    """
    ends = (switch.on, switch.off)
    single = [arm for arm in ends if arm not in RATED and arm in chosen(results)]
    rate = chosen(results)[single[0]]["rate"] if single else None
    on, off = (score(results, arm, rate=rate) for arm in ends)
    return on - off


def verdict(value: float, deviation: float | None) -> str:
    """What two deviations of seeds allow to say of an effect."""
    if deviation is None or math.isnan(value):
        return "-"
    if abs(value) < 2 * deviation:
        return "within noise"
    return "helps" if value < 0 else "harms"


def _switches(results: dict[str, dict]) -> list[str]:
    """Table of the techniques, each against the same recipe without it."""
    deviation = seed_deviation(results)
    lines = ["| switch | with | without | bits per byte | |", "|---|---|---|---|---|"]
    for switch in SWITCHES:
        value = effect(results, switch)
        if not math.isnan(value):
            said = verdict(value, deviation)
            lines.append(f"| {switch.name} | {switch.on} | {switch.off} | {value:+.4f} | {said} |")
    return [*lines, ""] if len(lines) > 2 else []


def _notes(results: dict[str, dict]) -> list[str]:
    """Targets and rules, seeds, rates; a line each."""
    lines = _targets(results)
    for arm in recipes():
        found = per_seed(results, arm)
        if len(found) > 1:
            listed = ", ".join(f"{r['bits_per_byte'][SCORED]:.4f}" for r in found.values())
            lines.append(f"{arm}, seeds {sorted(found)}: {listed}.")
    if (deviation := seed_deviation(results)) is not None:
        lines.append(
            f"Pooled standard deviation between seeds: {deviation:.4f}; a switch counts from "
            f"{2 * deviation:.4f} on."
        )
    for text in sorted({t for r in results.values() for t in r["bits_per_byte"]} - {TUNE, SCORED}):
        if (far := seed_deviation(results, text)) is not None:
            lines.append(f"Between seeds on {text}: {far:.4f}; not by it is anything chosen.")
    if "full+penalty" in chosen(results):
        lines.append(
            "At its default strength the penalty's gradient was less than a ten-thousandth of the "
            "task's at the start of training (it was not followed further): full+penalty shows "
            "little more than how far two runs of full part."
        )
    for arm in RATED:
        rates = {r["rate"]: r["bits_per_byte"][TUNE] for r in _first_seed(results, arm)}
        if len(rates) > 1:
            listed = ", ".join(f"{rate:g}: {rates[rate]:.4f}" for rate in sorted(rates))
            edge = min(rates, key=rates.__getitem__) in (min(rates), max(rates))
            remark = " (the best is the last one tried on that side)" if edge else ""
            lines.append(f"{arm}, learning rate: bits per byte to choose by: {listed}{remark}.")
    return [f"- {line}" for line in lines]


def _targets(results: dict[str, dict]) -> list[str]:
    """What the run has to show: it is long enough, and ternary weights come close to float ones."""
    base, other = (score(results, name) for name in ("float", "bitnet"))
    first = _difference_at_first_seed(results)
    lines = [
        f"Float is {other - base:.4f} bits per byte better than BitNet b1.58 ({first:.4f} at the "
        "first seed alone); at least 0.03 are wanted, or a longer run."
    ]
    for arm in ("full", "full-dead_zone"):
        gap, said = score(results, arm) - base, f" (the preset `{SHIPPED.get(arm)}`)"
        lines.append(
            f"{arm}{said if arm in SHIPPED else ''} is {gap:+.4f} from float (target: at most "
            f"+0.015) and closes {1 - gap / (other - base):.0%} of BitNet's gap (target: 50 %)."
        )
    return [line for line in lines if "nan" not in line]


def lengths(results: dict[str, dict]) -> list[dict[str, dict]]:
    """Results by steps of a run, shortest first; those that did not train stay with the first."""
    steps = sorted({result["steps"] for result in results.values() if "steps" in result})
    shortest = steps[0] if steps else None
    parts = [
        {key: r for key, r in results.items() if r.get("steps", shortest) == length}
        for length in steps
    ]
    return parts or [results]


def longer(results: dict[str, dict]) -> list[str]:
    """Markdown of every set of longer runs: table, targets, seeds."""
    lines = []
    for part in lengths(results)[1:]:
        (steps,) = {result["steps"] for result in part.values()}
        seen = next(iter(part.values()))["bytes"] / 1e6
        missing = [arm for arm in LONGER if arm not in chosen(part)]
        lines += ["", f"## The same, {steps} steps ({seen:.1f} million bytes)", ""]
        lines += ["Rates are those that were best in the shorter runs; the teacher is the float"]
        lines += [f"arm of this length. Not run: {', '.join(missing) or 'nothing'}.", ""]
        lines += [table(part)]
    return lines


def _difference_at_first_seed(results: dict[str, dict]) -> float:
    arms = chosen(results)
    if not {"float", "bitnet"} <= arms.keys():
        return math.nan
    left, right = (arms[name]["bits_per_byte"][SCORED] for name in ("bitnet", "float"))
    return left - right


def _first_seed(results: dict[str, dict], arm: str) -> list[dict]:
    found = [result for result in results.values() if result["arm"] == arm]
    first = min((result["seed"] for result in found), default=0)
    return [result for result in found if result["seed"] == first]


COLOURS = dict(zip(RATED, ("#0072b2", "#d55e00", "#009e73"), strict=True))


def plot(results: dict[str, dict], path: Path) -> None:
    """PNG: bits per byte of every arm, and the training losses of float, BitNet and full."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = chosen(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.32 * len(arms) + 1.8))
    shown = [arm for arm in arms if arm not in PTQ]
    deviation = seed_deviation(results)
    reach = 2 * deviation if deviation else 0.0
    labels = {arm: f"{arm} [{SHIPPED[arm]}]" if arm in SHIPPED else arm for arm in shown}
    for arm, label in labels.items():
        colour = COLOURS.get(arm, "#777777")
        left.errorbar(score(results, arm), label, xerr=reach or None, fmt="o", color=colour)
        for one in per_seed(results, arm).values():
            left.plot(one["bits_per_byte"][SCORED], label, "|", color=colour, ms=11)
    scores = {labels[arm]: score(results, arm) for arm in shown}
    centre = statistics.median(scores.values())
    widest = 4 * statistics.median(abs(value - centre) for value in scores.values()) + 0.02
    for label, value in scores.items():
        if value > centre + widest:  # beyond the edge: a figure instead of a point
            left.annotate(
                f"{value:.2f} >", (1.0, label), xycoords=("axes fraction", "data"), ha="right"
            )
    inside = [value for value in scores.values() if value <= centre + widest]
    left.set_xlim(min(inside) - reach - 0.003, max(inside) + reach + 0.003)
    left.invert_yaxis()
    left.grid(axis="y", color="#dddddd", lw=0.6)
    left.set_xlabel("bits per byte, held-out books; [preset]\nticks: seeds, bars: 2 deviations")
    for arm, colour in COLOURS.items():
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
        "packed models (float ones as they are) on books and text not trained on; a mean where",
        "an arm has several seeds, and gaps are to such means. The arm full is the warm start",
        "with a teacher and the dead-zone bias; others are changes of it, at its rate. What ships",
        "as the preset `full` is the arm full-dead_zone. The teacher is the best float arm; its",
        "own training is not counted: a recipe with it costs the bytes of two runs. Rates are",
        "chosen on a part that is not scored.",
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
            f"A step of {found['bytes_per_step']} bytes, {found['compiled']} compiled, without the "
            f"teacher where it is not named: {own}; the teacher's forward "
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
    short = lengths(results)[0]
    page = [*_heading(short), "", table(short), *longer(results), ""]
    page += _timings(extra.get("timings", {}))
    (folder / "ablation.md").write_text("\n".join(page).rstrip() + "\n")
    plot(short, folder / "ablation.png")
