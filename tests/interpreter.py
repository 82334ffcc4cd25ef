"""Test files of Triton kernels, run in a process in which Triton interprets them on the CPU.

Triton decides at import whether it interprets; such a file is collected twice, here and there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True in that process."""

inside = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process of test_in_the_interpreter"
)
outside = pytest.mark.skipif(INTERPRETED, reason="is the process")


def run_in_the_interpreter(file: str) -> None:
    """Fails as the tests of a file do there; skips where that interpreter cannot run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    numpy = pytest.importorskip("numpy", reason="Triton's interpreter needs NumPy")
    if TorchVersion(triton.__version__) < (3, 7) and TorchVersion(numpy.__version__) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} makes numbers of arrays of one "
            "element, which NumPy 2.4 refuses (triton-lang/triton#9171); NumPy 2.3 runs it"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", file],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
