"""GPU tests run where CUDA and Triton are there."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu(register_ops):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton")
