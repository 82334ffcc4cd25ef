"""linear: exact integer sums, every weight and dtype, gradients, autocast, compiled shapes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from reference import CASES, assert_as_good_as, linear_arguments, packed_case

from ternc.errors import KernelError
from ternc.formats import Quantized, pack, unpack
from ternc.runtime import dispatch
from ternc.runtime.ops import linear, quantize_act

pytestmark = pytest.mark.usefixtures("register_ops")

ANY_CASE = pytest.mark.parametrize("case", CASES)
TIED = pytest.mark.parametrize("case", [case for case in CASES if case[4] != "free"])
TARGETS = pytest.mark.parametrize("target", ["cpu", "cuda"])
BITS = pytest.mark.parametrize("bits", [8, 4, 0])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def exact_output(x, packed, bias, bits):
    """The op's definition in float64, from the activations it quantises to."""
    if bits:
        q, scale = quantize_act.reference(x.detach(), bits)
        x = q.double() * scale.double()
    y = x.double() @ unpack(packed).dequantize().double().T
    return y if bias is None else y + bias.double()


@TIED
@TARGETS
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_sums_are_exact(case, target, bits):
    packed = packed_case(case, target)
    x = torch.randn(3, case[1])
    bias = torch.randn(case[0])
    q, sx = quantize_act.reference(x, bits)
    quantized = unpack(packed)
    weight = quantized.codes.long()
    if quantized.multiplier is not None:
        expanded = quantized.multiplier.repeat_interleave(quantized.group_size, 1)
        weight = weight * expanded[:, : case[1]].long()
    sums = (q.long()[:, None, :] * weight).sum(-1)
    expected = sums.float() * sx * quantized.scale + bias
    arguments = linear_arguments(x, packed, bias, bits)
    assert torch.equal(linear.reference(*arguments), expected)
    if target == "cpu":
        assert torch.equal(torch.ops.ternc.linear(*arguments), expected)


def test_largest_sum():
    # 131,072 products of 127 * 127: the last in_features whose sum fits int32.
    columns = 131_072
    quantized = Quantized(
        torch.ones(1, columns, dtype=torch.int8),
        torch.ones(1),
        torch.full((1, columns // 128), 127, dtype=torch.uint8),
        128,
        1,
    )
    for sign in (1.0, -1.0):
        x = torch.full((1, columns), sign)
        y = torch.ops.ternc.linear(*linear_arguments(x, pack(quantized, "cpu")))
        expected = torch.tensor(sign * 127 * 127 * columns) * (torch.tensor(1.0) / 127)
        assert y.item() == expected.item()


@ANY_CASE
@TARGETS
@BITS
@DTYPES
def test_output(case, target, bits, dtype):
    packed = packed_case(case, target)
    x = torch.randn(2, 3, case[1]).to(dtype)
    bias = torch.randn(case[0]).to(dtype)
    run = torch.ops.ternc.linear if target == "cpu" else linear.reference
    y = run(*linear_arguments(x, packed, bias, bits))
    assert (y.dtype, y.shape) == (dtype, (2, 3, case[0]))
    exact = exact_output(x, packed, bias, bits)
    low = exact.float().to(dtype)
    assert_as_good_as(y, low, exact, atol=2e-6 * exact.abs().max().item())


@TIED
@pytest.mark.parametrize("bits", [8, 4])
@DTYPES
def test_the_kernel_is_the_reference_bit_for_bit(case, bits, dtype):
    packed = packed_case(case)
    for rows in (1, 2, 5, 17):
        x = torch.randn(rows, case[1]).to(dtype)
        bias = torch.randn(case[0]).to(dtype) if rows % 2 else None
        arguments = linear_arguments(x, packed, bias, bits)
        assert torch.equal(torch.ops.ternc.linear(*arguments), linear.reference(*arguments))


@ANY_CASE
@BITS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite(case, bits, value):
    packed = packed_case(case)
    x = torch.randn(3, case[1])
    expected = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))
    x[1, case[1] // 2] = value
    y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (1, 1, 1, 33)])
@BITS
def test_shapes_of_x(shape, bits):
    packed = packed_case(CASES[0])
    y = torch.ops.ternc.linear(*linear_arguments(torch.randn(shape), packed, None, bits))
    assert y.shape == (*shape[:-1], 5)


def test_x_that_is_not_contiguous():
    packed = packed_case(CASES[0])
    x = torch.randn(33, 6).T
    seen = torch.ops.ternc.linear(*linear_arguments(x, packed))
    expected = torch.ops.ternc.linear(*linear_arguments(x.contiguous(), packed))
    assert torch.equal(seen, expected)


@ANY_CASE
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_eager_straight_through(case, bits, dtype):
    packed = packed_case(case)
    x = torch.randn(2, 4, case[1]).to(dtype).requires_grad_()
    bias = torch.randn(case[0]).to(dtype).requires_grad_()
    packed.scale.requires_grad_()
    upstream = torch.randn(2, 4, case[0]).to(dtype)
    (torch.ops.ternc.linear(*linear_arguments(x, packed, bias, bits)) * upstream).sum().backward()
    seen = [x.grad, packed.scale.grad, bias.grad]

    scale = packed.scale.detach().requires_grad_()
    quantized = unpack(packed)
    unit = quantized.codes.float()
    if quantized.multiplier is not None:
        unit *= quantized.multiplier.repeat_interleave(quantized.group_size, 1)[:, : case[1]]
    per_column = scale[:, None]
    if scale.dim() == 2:
        per_column = scale.repeat_interleave(quantized.group_size, 1)[:, : case[1]]
    x2, bias2 = (t.detach().float().requires_grad_() for t in (x, bias))
    xq = x2
    if bits:
        q, sx = quantize_act.reference(x2.detach(), bits)
        xq = x2 + (q * sx - x2).detach()
    (torch.nn.functional.linear(xq, unit * per_column, bias2) * upstream.float()).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for gradient, expected in zip(seen, (x2.grad, scale.grad, bias2.grad), strict=True):
        assert gradient.shape == expected.shape
        error = (gradient.float() - expected).norm() / expected.norm()
        assert error <= tolerance


def test_gradients_only_where_asked():
    packed = packed_case(CASES[1])
    x = torch.randn(2, 64, requires_grad=True)
    torch.ops.ternc.linear(*linear_arguments(x, packed, torch.zeros(130))).sum().backward()
    assert x.grad is not None
    assert packed.scale.grad is None


def test_second_derivative_of_x():
    packed = packed_case(CASES[1])
    x = torch.randn(2, 64, requires_grad=True)
    y = torch.ops.ternc.linear(*linear_arguments(x, packed))
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    w = unpack(packed).dequantize()
    expected = 2 * (w.sum(1) @ w)
    torch.testing.assert_close(second, expected.expand(2, 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_alone(dtype):
    packed = packed_case(CASES[3])
    x = torch.randn(4, 100, requires_grad=True)
    bias = torch.randn(40)
    with torch.autocast("cpu", dtype=dtype):
        y = torch.ops.ternc.linear(*linear_arguments(x, packed, bias))
    expected = torch.ops.ternc.linear(*linear_arguments(x.to(dtype), packed, bias))
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_last_kernel_is_recorded():
    packed = packed_case(CASES[0])
    dispatch.forget(packed.weight)
    torch.ops.ternc.linear(*linear_arguments(torch.randn(1, 33), packed))
    assert dispatch.last_kernel(packed.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 50)}, "layout 'lanes x1' of \\[5, 50\\] is uint8 \\[1, 13, 64\\]"),
        ({0: torch.zeros(2, 33, dtype=torch.float64)}, "x is torch.float64"),
        ({0: torch.tensor(1.0)}, "x is a scalar"),
        ({4: torch.zeros(6)}, "bias is torch.float32 \\[6\\], not a float \\[5\\]"),
        ({7: 6}, "activation_bits=6, not 8, 4 or 0"),
    ],
)
def test_refused_arguments(change, message):
    arguments = list(linear_arguments(torch.zeros(2, 33), packed_case(CASES[0])))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(KernelError, match=message):
        linear.reference(*arguments)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(KernelError, match=message):
        torch.ops.ternc.linear(*meta)


@ANY_CASE
@BITS
def test_opcheck(case, bits):
    packed = packed_case(case)
    bias = torch.randn(case[0], requires_grad=True)
    x = torch.randn(2, 3, case[1], requires_grad=True)
    torch.library.opcheck(torch.ops.ternc.linear, linear_arguments(x, packed, bias, bits))


def test_opcheck_with_gradients_of_scales():
    packed = packed_case(CASES[3])
    packed.scale.requires_grad_()
    torch.library.opcheck(torch.ops.ternc.linear, linear_arguments(torch.randn(2, 100), packed))


def test_compiled_gradients():
    packed = packed_case(CASES[3])
    torch._dynamo.reset()
    eager = torch.randn(3, 100)
    compiled = eager.clone()

    def loss(x):
        x = torch.ops.ternc.fake_quantize_act(x * 2, 8)
        return torch.ops.ternc.linear(*linear_arguments(x, packed)).square().sum()

    loss(eager.requires_grad_()).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(compiled.requires_grad_()).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_compiled_with_dynamic_rows():
    packed = packed_case(CASES[3])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True)
    def call(x):
        return torch.ops.ternc.linear(*linear_arguments(x.relu(), packed)) + 1

    for rows in (3, 5, 9):  # 3 is no size of the weight: equal sizes share a symbol
        x = torch.randn(rows, 100)
        expected = torch.ops.ternc.linear(*linear_arguments(x.relu(), packed)) + 1
        assert torch.equal(call(x), expected)
    assert counter.frame_count == 1
