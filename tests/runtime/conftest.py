"""The instruction sets of csrc/, forced in turn."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

import ternc.csrc
from ternc.runtime import cpu, ops

NAMES = sorted(path.parent.name for path in Path(ternc.csrc.__path__[0]).glob("*/kernels.cpp"))
ARM = platform.machine() == "aarch64"
ISAS = [name for name in NAMES if name == "scalar" or name.startswith("neon") == ARM]
"""Those of the other architecture could only skip; `make test-neon` runs them."""


@pytest.fixture(params=ISAS)
def every_isa(request):
    """Name of the instruction set in use; one thread."""
    ops.register()
    if cpu.isa() is None:
        pytest.skip("no C++ library")
    if reason := cpu.available()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: waking threads would take most of the time
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)
    torch.set_num_threads(before)
