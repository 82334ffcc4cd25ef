"""quantize_act and fake_quantize_act: the contract's arithmetic, extreme rows, gradients."""

from __future__ import annotations

import pytest
import torch

from ternc.errors import DifferentiationError, KernelError
from ternc.runtime.ops import quantize_act

pytestmark = pytest.mark.usefixtures("register_ops")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
BITS = pytest.mark.parametrize("bits", [8, 4])

INPUTS = {
    "matrix": lambda: torch.randn(5, 37),
    "one value": lambda: torch.randn(1, 1),
    "vector": lambda: torch.randn(129),
    "three dimensions": lambda: torch.randn(2, 3, 127) * 100,
    "not contiguous": lambda: torch.randn(64, 6).T,
    "no rows": lambda: torch.randn(0, 16),
    "halves": lambda: torch.arange(-127, 128).float()[None] / 2,
}


@DTYPES
@pytest.mark.parametrize("name", INPUTS)
def test_eight_bits_element_by_element(name, dtype):
    x = INPUTS[name]().to(dtype)
    q, scale = torch.ops.ternc.quantize_act(x, 8)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (q.shape, scale.shape) == (x.shape, (*x.shape[:-1], 1))
    for row, codes, step in zip(
        x.reshape(-1, x.shape[-1]), q.reshape(-1, x.shape[-1]), scale.reshape(-1), strict=True
    ):
        largest = row.float().abs().max()
        assert step == largest / torch.tensor(127.0)
        inverse = torch.tensor(127.0) / largest
        assert torch.equal(codes, torch.round(row.float() * inverse).to(torch.int8))


@DTYPES
@pytest.mark.parametrize("name", INPUTS)
@BITS
def test_the_kernel_is_the_reference(name, dtype, bits):
    x = INPUTS[name]().to(dtype)
    q, scale = torch.ops.ternc.quantize_act(x, bits)
    expected_q, expected_scale = quantize_act.reference(x, bits)
    assert torch.equal(q, expected_q)
    assert q.stride() == expected_q.stride()
    assert torch.equal(scale, expected_scale)


def test_four_bits():
    x = torch.randn(64, 256)
    q, scale = torch.ops.ternc.quantize_act(x, 4)
    assert (int(q.min()), int(q.max())) == (-8, 7)
    mean = x.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(scale, mean / 7**0.5)
    expected = torch.round(x * 7**0.5 / mean).clamp(-8, 7)
    assert (q != expected).sum() <= 2
    assert ((q * scale - x).norm() / x.norm()) < 0.15


@BITS
def test_zero_rows_give_zero(bits):
    x = torch.randn(4, 32)
    x[1] = 0
    x[2] = 1e-40  # the quotient overflows fp32: counts as zero
    q, scale = torch.ops.ternc.quantize_act(x, bits)
    assert not q[1:3].any()
    assert scale[1:3].flatten().tolist() == [0.0, 0.0]
    assert (scale[[0, 3]] > 0).all()


@BITS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite(bits, value):
    x = torch.randn(3, 40)
    expected = torch.ops.ternc.quantize_act(x, bits)
    x[1, 7] = value
    q, scale = torch.ops.ternc.quantize_act(x, bits)
    assert scale[1].isnan()
    assert not q[1].any()
    for seen, wanted in zip((q, scale), expected, strict=True):
        assert torch.equal(seen[[0, 2]], wanted[[0, 2]])


def test_gradient_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(DifferentiationError, match="use ternc::fake_quantize_act"):
        torch.ops.ternc.quantize_act(x, 8)
    with torch.no_grad():
        torch.ops.ternc.quantize_act(x, 8)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [
        (torch.zeros(2, 3), 5, "bits=5, not 8 or 4"),
        (torch.zeros(2, 3, dtype=torch.float64), 8, "x is torch.float64"),
        (torch.tensor(1.0), 8, "x is a scalar"),
    ],
)
def test_refused_arguments(x, bits, message):
    with pytest.raises(KernelError, match=message):
        quantize_act.reference(x, bits)
    with pytest.raises(KernelError, match=message):
        torch.ops.ternc.quantize_act(x.to("meta"), bits)
    with pytest.raises((KernelError, RuntimeError)):
        torch.ops.ternc.quantize_act(x, bits)


@DTYPES
@BITS
def test_fake_quantize_act(dtype, bits):
    x = torch.randn(4, 50).to(dtype).requires_grad_()
    y = torch.ops.ternc.fake_quantize_act(x, bits)
    q, scale = torch.ops.ternc.quantize_act(x.detach(), bits)
    assert torch.equal(y, (q * scale).to(dtype))
    weights = torch.randn(4, 50).to(dtype)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_fake_quantize_act_shows_nan():
    x = torch.randn(2, 8)
    x[1, 3] = torch.nan
    assert torch.ops.ternc.fake_quantize_act(x, 8)[1].isnan().all()


@pytest.mark.parametrize("name", ["matrix", "vector", "three dimensions", "not contiguous"])
@BITS
def test_opcheck(name, bits):
    x = INPUTS[name]()
    torch.library.opcheck(torch.ops.ternc.quantize_act, (x, bits))
    torch.library.opcheck(torch.ops.ternc.fake_quantize_act, (x, bits))
    torch.library.opcheck(torch.ops.ternc.fake_quantize_act, (x.requires_grad_(), bits))
