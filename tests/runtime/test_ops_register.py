"""register: the documented schemas, once per process, with kernels, tags and a fallback."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ternc.runtime import ops

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.usefixtures("register_ops")


def documented_schemas() -> dict[str, str]:
    """The schemas of docs/architecture.md by op name, without white space."""
    text = re.sub(r"\s+", "", (ROOT / "docs" / "architecture.md").read_text())
    schema = r"ternc::(\w+)(\((?:Tensor|int|ScalarType)[^()]*\)->(?:Tensor(?:\[\])?|\([^()]*\)))"
    return dict(re.findall(schema, text))


def test_schemas_are_those_of_the_documentation():
    assert {op.name: op.schema.replace(" ", "") for op in ops.ALL} == documented_schemas()


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA"])
def test_kernels(op, key):
    name = f"ternc::{op.name}"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_tags(op):
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.ternc, op.name).default.tags


def test_registering_again_from_many_threads():
    errors = []

    def register():
        try:
            ops.register()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


WITHOUT_LIBRARY = """
import torch
from ternc.runtime import cpu, dispatch, ops
cpu.load = lambda: None
ops.register()
from ternc.config import Config
from ternc.formats import choose, pack
w = torch.randn(20, 64)
quantized = choose(w, Config(planes=3, group_size=32))
packed = pack(quantized, "cpu")
x = torch.randn(3, 64)
y = torch.ops.ternc.linear(
    x, packed.weight, packed.scale, packed.multiplier, None, 20, 32, 8, packed.layout
)
exact = x @ quantized.dequantize().T
assert (y - exact).norm() / exact.norm() < 0.02
print(dispatch.last_kernel(packed.weight))
dispatch.forget(packed.weight)
print(dispatch.last_kernel(packed.weight))
"""


def test_the_references_run_without_a_library():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.stdout.split() == ["reference", "None"], run.stderr
