"""What the backend does with models that nobody here wrote: one row an architecture.

    python benchmarks/zoo.py [--inner aot_eager|inductor|eager] [--only NAME ...] [--json FILE]

Exit status 1 where a graph break was added, an output is wrong, or a Linear went unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import tabulate
import torch
from torch import nn
from torch._dynamo.utils import counters

import ternc
from ternc.policy import excluded

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models import TOKENS, VOCABULARY, ZOO

TOLERANCE = 2e-2
"""Relative difference to the packed model run eagerly: roundings of q may differ by one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--only", nargs="*", default=[], help="names, or parts of names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name in ZOO:
        if options.only and not any(part in name for part in options.only):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows.append({"model": name, **examine(name, options.inner)})
        except Exception as error:
            traceback.print_exc(limit=-3)
            rows.append({"model": name, "failed": f"{type(error).__name__}: {error}"[:300]})
    print(tabulate.tabulate([_shown(row) for row in rows], headers="keys", tablefmt="github"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in row or row["wrong"] for row in rows))


def examine(name: str, inner: str) -> dict[str, Any]:
    """One model: inference compiled and compared, more shapes, one training step."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model = model.eval()
    options = {"inner": inner, "planes": 3}
    breaks = _graph_breaks(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(model, backend="ternc", options=options)
    with torch.no_grad():
        actual = _tensor(fast(**inputs))
        report = ternc.report(fast)
        packed = ternc.quantize(model, ternc.Config(planes=3, method="rtn"))
        expected = _tensor(packed(**inputs))
        for tokens in (TOKENS + 3, TOKENS + 7, 1, 1):
            if "input_ids" in inputs:
                fast(**{k: torch.randint(3, VOCABULARY, (2, tokens)) for k in inputs})
    added = sum(counters["graph_break"].values()) - breaks
    compilations = counters["stats"]["unique_graphs"]
    error = float((actual - expected).norm() / expected.norm())
    linears = [n for n, m in model.named_modules() if _is_linear(m)]
    seen = {row.name for row in report.rows}
    wanted = [n for n in linears if not excluded(n, ternc.Config())]
    done = {row.name for row in report.rewritten}
    refused = Counter(row.reason[:60] for row in report.skipped)
    ops = Counter(node.target for node in report.nodes if "ternc" in node.target)
    trained = _train(model, inputs, options)
    unseen = [n for n in linears if n not in seen]
    return {
        "linears": len(linears),
        "rewritten": len(report.rewritten),
        "share": len([n for n in wanted if n in done]) / max(1, len(wanted)),
        "refused": dict(refused),
        "unseen": unseen,
        "attention": len(report.attention),
        "products": sum(n for op, n in ops.items() if op.startswith("ternc.linear")),
        "norms": ops["ternc.norm_quantize.default"],
        "activations": ops["ternc.activate_quantize.default"],
        "breaks added": added,
        "compilations": compilations,
        "error": error,
        "kernels": sorted({row.kernel or "-" for row in report.rewritten}),
        "trained": trained,
        "wrong": bool(added > 0 or error > TOLERANCE or not trained),
    }


def _graph_breaks(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend="eager")(**inputs)
    return sum(counters["graph_break"].values())


def _train(model: nn.Module, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> bool:
    """Whether one compiled training step leaves finite gradients."""
    torch._dynamo.reset()
    model.train()
    fast = torch.compile(model, backend="ternc", options=options)
    _tensor(fast(**inputs)).float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(grads) and all(grad.isfinite().all() for grad in grads)


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return {"model": row["model"], "failed": row["failed"][:100]}
    keys = (
        "model",
        "linears",
        "rewritten",
        "share",
        "attention",
        "products",
        "norms",
        "activations",
    )
    shown = {key: row[key] for key in keys}
    shown.update(
        {
            "breaks": row["breaks added"],
            "compiles": row["compilations"],
            "error": f"{row['error']:.1e}",
            "trained": row["trained"],
            "unseen": len(row["unseen"]),
            "refused": "; ".join(f"{n}x {reason}" for reason, n in row["refused"].items())[:80],
        }
    )
    return shown


if __name__ == "__main__":
    sys.exit(main())
