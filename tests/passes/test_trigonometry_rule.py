"""Cosines and sines are kept in memory where Inductor would compute them again."""

from __future__ import annotations

import pytest
import torch
from graphs import run_with, targets

from ternc import Config
from ternc.passes.context import Context
from ternc.passes.pipeline import apply
from ternc.passes.rules.trigonometry import TrigonometryRule
from ternc.runtime import ops

ops.register()


def rewrite(function, *args, grad_enabled=False):
    """Output of the rewritten function, and how many copies it makes."""

    def edit(gm, inputs):
        apply(TrigonometryRule(), gm, Context(Config(), list(inputs), grad_enabled, False))

    output, (gm,) = run_with(function, edit, *args)
    return output, sum(name == "inductor_force_stride_order.default" for name in targets(gm))


def rotary(x, angles):
    cos, sin = angles.cos(), torch.sin(angles)
    return x * cos + x.flip(-1) * sin, x * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_and_sines_are_kept_once(dtype):
    x, angles = torch.randn(2, 3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    angles[0, :3] = torch.tensor([0.0, float("inf"), float("nan")])
    seen, copies = rewrite(rotary, x, angles)
    assert copies == 2
    torch.testing.assert_close(seen, rotary(x, angles), rtol=0, atol=0, equal_nan=True)


def test_leaves_training_other_types_and_numbers():
    x = torch.randn(2, 3, 8)
    assert rewrite(rotary, x, x, grad_enabled=True)[1] == 0
    assert rewrite(rotary, x.double(), x.double())[1] == 0
    assert rewrite(rotary, x, torch.tensor(0.5))[1] == 0


def test_leaves_what_is_written_into_a_tensor_that_is_given():
    def write(x, y):
        torch.cos(x, out=y).add_(1)
        return y + 0

    x = torch.randn(3, 8)
    seen, copies = rewrite(write, x, torch.zeros(3, 8))
    assert copies == 0
    torch.testing.assert_close(seen, x.cos() + 1)
