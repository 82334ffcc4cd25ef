"""Mixtures of experts on the GPU: one product for all experts, no wait for the router."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from launches import kernels_of
from packed_weights import assert_same, packed_on_gpu
from torch import nn

from ternc.backend import ternc_backend
from ternc.config import INT8
from ternc.runtime import dispatch
from ternc.runtime.ops import grouped_linear, quantize_act

pytestmark = pytest.mark.gpu


def arguments_of(experts, rows, columns, planes, group_size, dtype=torch.bfloat16):
    """Of ternc::grouped_linear, from the weight on."""
    stack = experts * grouped_linear.padded_rows(rows)
    packed = packed_on_gpu(stack, columns, planes, group_size)
    tensors = (packed.weight, packed.scale, packed.multiplier)
    return (*tensors, experts, rows, group_size, 8, packed.layout, dtype)


def ends_of(counts):
    return torch.tensor(counts, device="cuda").cumsum(0).int()


@pytest.mark.parametrize(
    ("rows", "columns", "planes", "group_size"),
    [(70, 300, 1, 0), (200, 1024, 1, 128), (129, 700, 2, 0), (64, 520, 3, 64)],
)
@pytest.mark.parametrize("counts", [[1, 0, 1], [5, 0, 90], [0, 0, 0], [400, 33, 700]], ids=str)
def test_products(rows, columns, planes, group_size, counts):
    """Each expert's product alone, bit for bit; rows without an expert are zero."""
    rest = arguments_of(3, rows, columns, planes, group_size)
    x = torch.randn(sum(counts) + 3, columns, device="cuda", dtype=torch.bfloat16)
    for given in ((x, None), quantize_act.reference(x, 8)):
        for offsets in (ends_of(counts), None):
            y = torch.ops.ternc.grouped_linear(*given, offsets, *rest)
            assert dispatch.last_kernel(rest[0]) == "triton_grouped"
            assert_same(y, grouped_linear.grouped_linear(*given, offsets, *rest))


@pytest.mark.parametrize(
    ("planes", "group_size", "scales", "bits"),
    [
        (1, 128, "row", 0),
        (2, 64, "free", 0),
        (1, 128, "free", 8),
        (INT8, 0, "row", 8),
        (INT8, 0, "row", 0),
    ],
)
@pytest.mark.parametrize("counts", [[1, 0, 1], [400, 33, 700]], ids=str)
def test_products_of_other_stacks(planes, group_size, scales, bits, counts):
    """Free scales, int8 experts and floating-point rows have a kernel too."""
    rows, columns = 200, 1000
    packed = packed_on_gpu(
        3 * grouped_linear.padded_rows(rows), columns, planes, group_size, scales
    )
    tensors = (packed.weight, packed.scale, packed.multiplier)
    rest = (*tensors, 3, rows, group_size, bits, packed.layout, torch.bfloat16)
    x = torch.randn(sum(counts) + 3, columns, device="cuda", dtype=torch.bfloat16)
    for given in [(x, None)] + ([quantize_act.reference(x, bits)] if bits else []):
        for offsets in (ends_of(counts), None):
            y = torch.ops.ternc.grouped_linear(*given, offsets, *rest)
            assert dispatch.last_kernel(packed.weight) == "triton_grouped_any"
            expected = grouped_linear.grouped_linear(*given, offsets, *rest)
            if planes == INT8 and bits:
                assert_same(y, expected)
            else:
                torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_a_recorded_graph_follows_the_offsets():
    rest = arguments_of(4, 200, 512, 1, 128)
    x = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
    offsets = ends_of([10, 10, 10, 10])
    torch.ops.ternc.grouped_linear(x, None, offsets, *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.ternc.grouped_linear(x, None, offsets, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.ternc.grouped_linear(x, None, offsets, *rest)
    for counts in ([40, 0, 0, 0], [1, 2, 3, 4], [0, 39, 0, 1]):
        offsets.copy_(ends_of(counts))
        y.fill_(torch.nan)
        graph.replay()
        assert_same(y, grouped_linear.grouped_linear(x, None, offsets, *rest))


class Experts(nn.Module):
    """Two experts a token, of four; its router in fp32, where no rounding chooses others."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(256, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 256, 2 * 192) / 16)
        self.down = nn.Parameter(torch.randn(4, 192, 256) / 14)

    def forward(self, x):
        chosen, expert = self.router(x.float()).softmax(-1).topk(2, dim=-1)
        order = expert.flatten().argsort()
        ends = F.one_hot(expert.flatten(), 4).sum(0).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[order // 2], self.up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        y = y * chosen.to(y.dtype).flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, y)


@pytest.mark.parametrize("tokens", [1, 24])
def test_a_model_under_recorded_graphs(tokens):
    torch._dynamo.reset()
    model = Experts().cuda().bfloat16().eval()
    model.router.float()
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        options = {"inner": "eager", "planes": 1}
        eager = torch.compile(model, backend=ternc_backend, options=options)
        expected = eager(x)
        assert sum("gemm_grouped" in name for name in kernels_of(lambda: eager(x))) == 2
        torch._dynamo.reset()
        options = {"planes": 1, "inductor": {"triton.cudagraphs": True}}
        fast = torch.compile(model, backend=ternc_backend, options=options)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = fast(x).clone()
    assert (y - expected).float().norm() <= 0.02 * expected.float().norm()
