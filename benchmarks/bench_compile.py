"""Compile time of a 12-layer decoder: the backend beside Inductor alone, cold caches.

    python benchmarks/bench_compile.py [--layers 12] [--rounds 3] [--json FILE]

Every measurement is a process of its own with empty caches; the contenders take turns. The first
call is timed (tracing, rewriting, packing, code generation and the C++ compiler), and so is the
processor time of the process and its children, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tabulate

sys.path.insert(0, str(Path(__file__).parent))
from common import machine

CONTENDERS = ("inductor", "ternc", "ternc, packed")


def measure(contender: str, layers: int) -> dict[str, float]:
    """First call of one compiled model in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import ternc
    from ternc.runtime import ops

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes, **heads)).eval()
    ids = torch.randint(0, 512, (1, 32))
    ops.register()  # loads the C++ library, which is built at install
    if contender == "ternc, packed":
        model = ternc.quantize(model)
    backend = "inductor" if contender == "inductor" else "ternc"
    fast = torch.compile(model, backend=backend)
    start, used = time.perf_counter(), _processor_seconds()
    with torch.no_grad():
        fast(input_ids=ids, use_cache=False)
    return {"wall": time.perf_counter() - start, "processor": _processor_seconds() - used}


def _processor_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _in_fresh_process(contender: str, layers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as caches:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": caches,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, __file__, "--child", contender, "--layers", str(layers)]
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.layers)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, measured in found.items():
            measured.append(_in_fresh_process(name, options.layers))
    medians = {
        name: {key: statistics.median(m[key] for m in measured) for key in ("wall", "processor")}
        for name, measured in found.items()
    }
    base = medians["inductor"]
    rows = [
        (
            name,
            m["wall"],
            m["wall"] / base["wall"],
            m["processor"],
            m["processor"] / base["processor"],
        )
        for name, m in medians.items()
    ]
    headers = ("first call", "wall s", "x Inductor", "processor s", "x Inductor")
    print(tabulate.tabulate(rows, headers, floatfmt=".2f"))
    if options.json:
        facts = {"machine": machine(1), "layers": options.layers, "runs": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
