"""ternc::quantize_act and ternc::dequantize on the GPU against their references."""

from __future__ import annotations

import pytest
import torch
from packed_weights import assert_same, packed_on_gpu
from reference import CASES, dequantize_arguments

from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize, quantize_act

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 3, 127, 4096, 20000])
def test_quantize_act(dtype, bits, columns):
    x = torch.randn(300, columns, device="cuda", dtype=dtype)
    x[::50, 0] = torch.nan
    x[1::50, 0] = torch.inf
    x[2::50] = 0
    x[3::50] = x[3::50] * 1e-30
    q, scale = torch.ops.ternc.quantize_act(x.view(3, 100, columns), bits)
    expected_q, expected_scale = quantize_act.reference(x.view(3, 100, columns), bits)
    assert torch.equal(q, expected_q)
    assert_same(scale, expected_scale)


def test_halves_round_to_even():
    x = torch.arange(-127, 127, device="cuda").float() + 0.5
    x = torch.cat([x, x.new_tensor([127.0])])
    q, scale = torch.ops.ternc.quantize_act(x, 8)
    assert scale.item() == 1.0
    assert torch.equal(q, x.round().to(torch.int8))


@pytest.mark.parametrize("case", [*CASES, (70, 1500, 1, 0, "row"), (33, 700, 3, 128, "row")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(case, dtype):
    packed = packed_on_gpu(*case)
    arguments = dequantize_arguments(packed, dtype)
    w = torch.ops.ternc.dequantize(*arguments)
    assert dispatch.last_kernel(packed.weight) == "triton_dequantize"
    assert_same(w, dequantize.reference(*arguments))


@pytest.mark.parametrize("group_size", [128, 0, -1])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_fit_and_fake_quantize(planes, group_size):
    """As good a fit as on the CPU; near ties, sums in another order may choose other codes."""
    w = torch.randn(64, 300)
    error = (torch.ops.ternc.fake_quantize(w, planes, group_size) - w).norm()
    error_gpu = (torch.ops.ternc.fake_quantize(w.cuda(), planes, group_size).cpu() - w).norm()
    torch.testing.assert_close(error_gpu, error, rtol=1e-3, atol=0)
    w = w.cuda().requires_grad_()
    torch.ops.ternc.fake_quantize(w, planes, group_size).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
