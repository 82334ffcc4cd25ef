"""grouped_linear on the CPU: rows of x times the weight of their expert, as `linear` defines it."""

from __future__ import annotations

import pytest
import torch
from reference import random_quantized

from ternc.config import INT8
from ternc.errors import KernelError
from ternc.formats import Quantized, pack
from ternc.runtime.ops import linear, quantize_act
from ternc.runtime.ops.grouped_linear import padded_rows

pytestmark = pytest.mark.usefixtures("every_isa")
K, N = 68, 129


def stack_of(experts, planes, group_size, scales):
    """Random weights [experts * 256, K]: rows past N of each are zero."""
    stack = random_quantized(experts * padded_rows(N), K, planes, group_size, scales)
    stack.codes.view(experts, -1, K)[:, N:] = 0
    return stack


def expert_of(stack, index, experts):
    def part(tensor):
        return None if tensor is None else tensor.chunk(experts)[index][:N]

    scale = stack.scale if stack.scale.numel() == 1 else part(stack.scale)
    return Quantized(
        part(stack.codes), scale, part(stack.multiplier), stack.group_size, stack.planes
    )


@pytest.mark.parametrize(
    "kind", [(1, 0, "row"), (1, 32, "tensor"), (2, 32, "free"), (3, 64, "row"), (INT8, 0, "row")]
)
@pytest.mark.parametrize("ends", [[4, 4, 7], [0, 0, 0], [9, 9, 9], None], ids=str)
def test_every_row_meets_its_expert(kind, ends):
    stack = stack_of(3, *kind)
    packed = pack(stack, "cpu")
    x = torch.randn(9, K)
    q, sx = quantize_act.reference(x, 8)
    expected = torch.zeros(9, N)
    begin = 0
    for index, end in enumerate(ends or [3, 6, 9]):
        rows = slice(begin, end)
        expected[rows] = linear.integer_linear(q[rows], sx[rows], expert_of(stack, index, 3), None)
        begin = end
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    weight = (packed.weight, packed.scale, packed.multiplier)
    rest = (3, N, packed.group_size, 8, packed.layout, torch.float32)
    for given in ((x, None), (q, sx)):
        y = torch.ops.ternc.grouped_linear(*given, offsets, *weight, *rest)
        torch.testing.assert_close(y, expected, rtol=1e-5 if kind[2] == "free" else 0, atol=0)


def test_blocks_of_two_experts_are_refused():
    packed = pack(stack_of(2, 1, 0, "row"), 14)
    arguments = (torch.randn(2, K), None, None, packed.weight, packed.scale, None)
    with pytest.raises(KernelError, match="layout 14"):
        torch.ops.ternc.grouped_linear(*arguments, 2, N, 0, 8, packed.layout, torch.float32)
