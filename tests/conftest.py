"""Fixtures of every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def register_ops():
    """The ternc:: operators."""
    from ternc.runtime import ops

    ops.register()
