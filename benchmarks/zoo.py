"""What the backend does with models that nobody here wrote: one row an architecture.

    python benchmarks/zoo.py [--inner aot_eager|inductor|eager] [--only NAME ...] [--json FILE]

Exit status 1 where a model misses a rule of `misses`. `--json FILE` also writes the table, as
FILE with the suffix .md; both are written after every model, and a run of the same commit goes on
after the models that it finds there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import ternc
from ternc.config import Config
from ternc.policy import excluded

sys.path.insert(0, str(Path(__file__).parent))
from common import commit
from zoo_models import LAYERS, TOKENS, VOCABULARY, ZOO

TOLERANCE = 2e-2
"""Relative difference to the packed model run eagerly: roundings of q may differ by one."""
FLOAT_TOLERANCE = 1e-5
"""The same with floating-point activations: nothing is rounded on the way."""
SHARE = 0.97
"""Of the weights that the default policy does not exclude, by count and by parameters."""
COMPILATIONS = 3
PRODUCTS = r"ternc\.(linears?\d?|grouped_linear)\.default"
OPS = {"product": PRODUCTS, "norm": r"ternc\.norm_quantize", "act": r"ternc\.activate_quantize"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    facts = {"commit": commit(), "torch": torch.__version__, "inner": options.inner}
    rows = _earlier(options.json, facts)
    for name in ZOO:
        wanted = not options.only or any(part in name for part in options.only)
        if not wanted or any(row["model"] == name for row in rows):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            row = {"model": name, **examine(name, options.inner)}
            rows.append({**row, "misses": misses(row)})
        except Exception as error:
            traceback.print_exc(limit=-3)
            rows.append({"model": name, "misses": [f"{type(error).__name__}: {error}"[:300]]})
        rows.sort(key=lambda row: list(ZOO).index(row["model"]))
        if options.json:
            _write(options.json, facts, rows)
    print(_table(rows))
    return int(any(row["misses"] for row in rows))


def _earlier(path: Path | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an interrupted run of the same commit, torch and inner compiler has written."""
    if path is None or not path.exists():
        return []
    known = json.loads(path.read_text())
    return known["rows"] if {key: known.get(key) for key in facts} == facts else []


def _write(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{_title(facts)}\n\n{_table(rows)}\n\n{_LEGEND}\n")


def _table(rows: list[dict[str, Any]]) -> str:
    return tabulate.tabulate(map(_shown, rows), headers="keys", tablefmt="github")


def examine(
    name: str,
    inner: str,
    layers: int = LAYERS,
    *,
    floats: bool = True,
    lengths: bool = True,
    training: bool = True,
) -> dict[str, Any]:
    """One model: served and compared, its report read, one training step.

    Args:
        floats: also compile and compare with floating-point activations.
        lengths: also serve tokens with the cache, or other lengths.
        training: also run a training step.
    """
    torch.manual_seed(0)
    model, inputs = ZOO[name](layers)
    model = model.eval()
    options = {"inner": inner, "planes": 3}
    fast = _compiled(model, options)
    with torch.no_grad():
        actual = _tensor(fast(**inputs))
        report = ternc.report(fast)
        if lengths:
            _serve(fast, inputs)
        error = _difference(actual, model, inputs, report, Config(planes=3, method="rtn"))
    added = sum(counters["graph_break"].values())
    compilations = counters["stats"]["unique_graphs"]
    linears = [n for n, m in model.named_modules() if _is_linear(m)]
    wanted = [row for row in report.rows if row.shape and not excluded(row.name, Config())]
    done = {row.name for row in report.rewritten}
    return {
        "linears": len(linears),
        "weights": len([row for row in report.rows if row.shape]),
        "rewritten": len(report.rewritten),
        "share": _share([1 for _ in wanted], [row.name in done for row in wanted]),
        "share of parameters": _share(
            [row.shape[0] * row.shape[1] for row in wanted], [row.name in done for row in wanted]
        ),
        "refused": dict(Counter(row.reason for row in report.skipped)),
        "unseen": [name for name in linears if name not in {row.name for row in report.rows}],
        "attention": len([row for row in report.attention if row.action == "rewritten"]),
        "attention as written": dict(
            Counter(row.reason for row in report.attention if row.action == "skipped")
        ),
        "attention modules": len(_attention_modules(model)),
        "ops of a block": _ops_of_a_block(report.nodes),
        "breaks added": added - (_breaks_without(model, inputs, lengths) if added else 0),
        "compilations": compilations,
        "error": error,
        "error with float activations": _float_error(model, inputs, inner) if floats else 0.0,
        "kernels": sorted({row.kernel or "-" for row in report.rewritten}),
        "training breaks added": _train(model, inputs, options) if training else 0,
    }


def misses(row: dict[str, Any]) -> list[str]:
    """The rules that one architecture breaks, in words; empty where all is well."""
    found = row["attention"] + sum(row["attention as written"].values())
    rules = {
        f"Linears without a row: {row['unseen']}": not row["unseen"],
        f"a share of {row['share']:.3f} of the weights": row["share"] >= SHARE,
        f"a share of {row['share of parameters']:.3f} of the parameters": (
            row["share of parameters"] >= SHARE
        ),
        f"{found} attention regions in {row['attention modules']} modules": (
            found >= row["attention modules"]
        ),
        f"{row['breaks added']} graph breaks added": row["breaks added"] <= 0,
        f"{row['compilations']} compilations": row["compilations"] <= COMPILATIONS,
        f"error {row['error']:.1e}": row["error"] <= TOLERANCE,
        f"error {row['error with float activations']:.1e} with float activations": (
            row["error with float activations"] <= FLOAT_TOLERANCE
        ),
        f"{row['training breaks added']} graph breaks added in training": (
            row["training breaks added"] <= 0
        ),
    }
    return [miss for miss, holds in rules.items() if not holds]


def _compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend="ternc", options=options)


def _serve(fast: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A prompt and tokens with its cache, where the model keeps one; else other lengths."""
    tokens = [name for name in inputs if name.endswith("input_ids")]
    if not tokens:
        return
    output = fast(**inputs)
    cache = None if isinstance(output, torch.Tensor) else output.get("past_key_values")
    read = tokens if cache is None else tokens[-1:]
    more = {} if cache is None else {"past_key_values": cache}
    for length in (TOKENS + 3, TOKENS + 7) if cache is None else (1, 1, 1):
        ids = {name: torch.randint(3, VOCABULARY, (2, length)) for name in read}
        fast(**{**inputs, **ids, **more})


def _difference(
    actual: torch.Tensor,
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    report: ternc.Report,
    config: Config,
) -> float:
    """Relative difference to the eager model that holds the same quantised weights."""
    packed = ternc.quantize(model, config)
    stacks = {row.name for row in report.rewritten if "stacked experts" in row.pattern}
    with _QuantizedStacks([p for n, p in packed.named_parameters() if n in stacks], config):
        expected = _tensor(packed(**inputs))
    return float((actual - expected).norm() / expected.norm())


class _QuantizedStacks(TorchFunctionMode):
    """Products with stacked experts, on the values that the rewritten graph packs."""

    def __init__(self, stacks: list[nn.Parameter], config: Config) -> None:
        super().__init__()
        self.addresses = {stack.data_ptr() for stack in stacks}
        self.config = config

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback", "bmm"):
            x, stack, *rest = args
            if stack.data_ptr() in self.addresses:
                args = (self._activations(x), self._weights(stack), *rest)
        return func(*args, **(kwargs or {}))

    def _activations(self, x: torch.Tensor) -> torch.Tensor:
        bits = self.config.op_activation_bits
        return torch.ops.ternc.fake_quantize_act(x, bits) if bits else x

    def _weights(self, stack: torch.Tensor) -> torch.Tensor:
        turned = stack.transpose(-2, -1)
        group = self.config.fit_group if self.config.fit_group < turned.shape[-1] else 0
        flat = torch.ops.ternc.fake_quantize(turned.flatten(0, 1), self.config.planes, group)
        return flat.view(turned.shape).transpose(-2, -1)


def _float_error(model: nn.Module, inputs: dict[str, torch.Tensor], inner: str) -> float:
    fast = _compiled(model, {"inner": inner, "planes": 3, "activation_bits": None})
    config = Config(planes=3, method="rtn", activation_bits=None)
    with torch.no_grad():
        actual = _tensor(fast(**inputs))
        return _difference(actual, model, inputs, ternc.report(fast), config)


def _train(model: nn.Module, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> int:
    """Graph breaks added to one training step, whose gradients must be finite."""
    fast = _compiled(model.train(), options)
    _tensor(fast(**inputs)).float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads), "no finite gradients"
    added = sum(counters["graph_break"].values())
    return added - (_breaks_without(model, inputs, False) if added else 0)


def _breaks_without(model: nn.Module, inputs: dict[str, torch.Tensor], lengths: bool) -> int:
    """Graph breaks of the same calls where nothing is rewritten."""
    torch._dynamo.reset()
    counters.clear()
    plain = torch.compile(model, backend="aot_eager")
    with torch.set_grad_enabled(model.training):
        plain(**inputs)
        if lengths:  # with sizes that vary Dynamo may break where it did not before
            _serve(plain, inputs)
    return sum(counters["graph_break"].values())


def _share(sizes: list[int], done: list[bool]) -> float:
    return sum(size for size, is_done in zip(sizes, done, strict=True) if is_done) / sum(sizes)


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def _attention_modules(model: nn.Module) -> list[str]:
    """Innermost modules that are called attention."""
    found = [n for n, m in model.named_modules() if "Attention" in type(m).__name__]
    return [n for n in found if not any(other.startswith(f"{n}.") for other in found)]


def _ops_of_a_block(nodes: list[Any]) -> dict[str, dict[str, int]]:
    """Ternary ops of the last block of every stack of blocks: stack -> kind -> count."""
    blocks: dict[str, dict[int, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for node in nodes:
        kind = next((kind for kind, op in OPS.items() if re.match(op, node.target)), None)
        place = re.match(r"(.*?)\.(\d+)(\.|$)", node.layer or "")
        if kind and place:
            blocks[place[1]][int(place[2])][kind] += 1
    return {stack: dict(indices[max(indices)]) for stack, indices in blocks.items()}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    if "linears" not in row:
        return {"model": row["model"], "misses": row["misses"][0][:100]}
    ops = [
        " + ".join(f"{n} {k}" for k, n in kinds.items()) for kinds in row["ops of a block"].values()
    ]
    refused = {**row["refused"], **row["attention as written"]}
    return {
        "model": row["model"],
        "Linears": row["linears"],
        "weights": row["weights"],
        "rewritten": row["rewritten"],
        "share": f"{row['share']:.0%}",
        "of parameters": f"{row['share of parameters']:.0%}",
        "attention": row["attention"],
        "as written": sum(row["attention as written"].values()),
        "ternary ops of a block": "; ".join(ops),
        "breaks": row["breaks added"] + row["training breaks added"],
        "compiles": row["compilations"],
        "error": f"{row['error']:.1e}",
        "float act.": f"{row['error with float activations']:.1e}",
        "refused": "; ".join(f"{n}x {reason}" for reason, n in refused.items()),
        "misses": "; ".join(row["misses"]) or "none",
    }


def _title(facts: dict[str, Any]) -> str:
    return (
        f"# Architectures through the backend, inner={facts['inner']}\n\n"
        f"`make zoo`, commit {facts['commit']}, torch {facts['torch']}, CPU."
    )


_LEGEND = """\
Linears: `nn.Linear` and `Conv1D` modules. Weights: what the report has a row for, stacked experts
and the parts of multi-head attention included. Share: of the weights that the default policy does
not exclude. Attention: regions that became one fused attention; as written: recognised and left,
with the reason. Ops of a block: the last of every stack of blocks. Breaks: graph breaks that the
backend adds, in inference and training together. Compiles: a prompt and tokens with a cache, or
three lengths. Error: relative difference to the model of `ternc.quantize` with the same settings
(stacked experts: quantised where they are read), run eagerly, with int8 and with floating-point
activations; with int8 a last-bit difference before a rounding can flip it. Every model also ran one
training step with finite gradients."""


if __name__ == "__main__":
    sys.exit(main())
