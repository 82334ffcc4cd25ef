"""linears1..4 in C++: every instruction set against the references, bit for bit."""

from __future__ import annotations

import pytest
import torch
from reference import random_quantized, spread_out

from ternc.errors import KernelError
from ternc.formats import pack
from ternc.runtime import cpu
from ternc.runtime.ops import linears, linears1

pytestmark = pytest.mark.usefixtures("every_isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BITS = pytest.mark.parametrize("bits", [8, 4])
TOKENS = (0, 1, 2, 5, 33)

WEIGHTS = [
    # rows, planes, group_size, scales, bias
    (129, 1, 128, "row", True),
    (3, 2, 0, "tensor", False),
    (65, 3, 32, "row", True),
    (127, 1, 32, "free", False),
]


def assert_same(seen, expected):
    """Bit for bit, NaN where NaN is expected."""
    assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
    assert torch.equal(seen.isnan(), expected.isnan())
    assert torch.equal(seen.nan_to_num(), expected.nan_to_num())


def linears_arguments(x, sx, weights, columns, bits, dtype):
    """Arguments of ternc::linears2..4."""
    packed, biases = [], []
    for rows, planes, group_size, scales, bias in weights:
        packed.append(pack(random_quantized(rows, columns, planes, group_size, scales), "cpu"))
        biases.append(torch.randn(rows) if bias else torch.empty(0))
    none = torch.empty(0, dtype=torch.uint8)
    return (
        x,
        sx,
        [p.weight for p in packed],
        [p.scale for p in packed],
        [none if p.multiplier is None else p.multiplier for p in packed],
        biases,
        [p.shape[0] for p in packed],
        [p.group_size for p in packed],
        bits,
        [p.layout for p in packed],
        dtype,
    )


def run(arguments):
    """ternc::linears1..4, by the number of weights."""
    count = len(arguments[2])
    if count == 1:
        return (torch.ops.ternc.linears1(*single(arguments)),)
    return getattr(torch.ops.ternc, f"linears{count}")(*arguments)


def single(arguments, residual=None):
    """Arguments of ternc::linears1 for those of a list of one."""
    x, sx, *lists, out_features, group_sizes, bits, layouts, dtype = arguments
    weight, scale, multiplier, bias = (entries[0] for entries in lists)
    tensors = (weight, scale, linears.given(multiplier), linears.given(bias), residual)
    return (x, sx, *tensors, out_features[0], group_sizes[0], bits, layouts[0], dtype)


@DTYPES
@BITS
@pytest.mark.parametrize("columns", [1, 3, 127, 129, 260])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_linears_are_bit_for_bit(dtype, bits, columns, count):
    for tokens in TOKENS:
        x = torch.randn(tokens, columns).to(dtype)
        first = tokens % len(WEIGHTS)
        weights = (WEIGHTS[first:] + WEIGHTS[:first])[:count]
        arguments = linears_arguments(x, None, weights, columns, bits, dtype)
        seen = run(arguments)
        assert len(seen) == count
        for y, expected in zip(seen, linears.reference(*arguments), strict=True):
            assert_same(y, expected)
        q, sx = torch.ops.ternc.quantize_act(x, bits)
        for y, expected in zip(run((q, sx, *arguments[2:])), seen, strict=True):
            assert_same(y, expected)


@pytest.mark.parametrize("count", [1, 4])
def test_linears_of_floats_are_those_of_linear(count):
    x = torch.randn(5, 132)
    arguments = linears_arguments(x, None, WEIGHTS[:count], 132, 0, x.dtype)
    for i, y in enumerate(run(arguments)):
        weight, scale, multiplier, bias = (entries[i] for entries in arguments[2:6])
        rest = (arguments[6][i], arguments[7][i], 0, arguments[9][i])
        multiplier, bias = linears.given(multiplier), linears.given(bias)
        assert_same(y, torch.ops.ternc.linear(x, weight, scale, multiplier, bias, *rest))


@DTYPES
@BITS
def test_linears_with_a_residual(dtype, bits):
    for tokens in TOKENS:
        x, residual = torch.randn(tokens, 130).to(dtype), torch.randn(tokens, 129).to(dtype)
        arguments = linears_arguments(x, None, WEIGHTS[:1], 130, bits, dtype)
        for given in (arguments[:2], torch.ops.ternc.quantize_act(x, bits)):
            one = single((*given, *arguments[2:]), residual)
            assert_same(torch.ops.ternc.linears1(*one), linears1.reference(*one))


@DTYPES
def test_floating_point_tokens_in_turn_as_integers_and_not(dtype):
    """Each of many tokens with its own bias and residual, in whichever way it is multiplied."""
    x, residual = torch.randn(40, 1024).to(dtype), torch.randn(40, 129).to(dtype)
    x[[3, 20], 5], x[30] = 1000.0, 0.0
    arguments = linears_arguments(x, None, WEIGHTS[:1], 1024, 0, dtype)
    alone = run(arguments)[0]
    assert_same(torch.ops.ternc.linears1(*single(arguments, residual)), alone + residual)
    for token in (0, 3, 4, 19, 20, 29, 30, 39):
        one = (x[token : token + 1], *arguments[1:])
        assert_same(run(one)[0], alone[token : token + 1])
    low = linears.reference(*arguments)[0]
    torch.testing.assert_close(alone, low, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-2)


def test_linears_of_strided_tokens():
    x, residual = torch.randn(2, 129, 3).transpose(1, 2), torch.randn(129, 3, 2).permute(2, 1, 0)
    one = single(linears_arguments(x, None, WEIGHTS[:1], 129, 8, x.dtype), residual)
    assert_same(torch.ops.ternc.linears1(*one), linears1.reference(*one))


def test_linears_of_operands_that_are_not_dense():
    q, sx = torch.ops.ternc.quantize_act(torch.randn(5, 260), 8)
    arguments = single(linears_arguments(q, sx, WEIGHTS[:1], 260, 8, torch.float32))
    spread = [spread_out(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    assert sum(isinstance(a, torch.Tensor) for a in spread) == 6
    assert_same(torch.ops.ternc.linears1(*spread), torch.ops.ternc.linears1(*arguments))


def test_linears_record_every_weight(every_isa):
    arguments = linears_arguments(torch.randn(1, 64), None, WEIGHTS, 64, 8, torch.float32)
    for weight in arguments[2]:
        cpu.forget_kernel(weight)
    run(arguments)
    assert [cpu.last_kernel(weight) for weight in arguments[2]] == [every_isa] * 4


def test_a_token_that_is_not_finite():
    x = torch.randn(6, 132)
    arguments = linears_arguments(x, None, WEIGHTS, 132, 8, x.dtype)
    before = run(arguments)
    x[2, 7] = torch.nan
    for y, expected in zip(run(arguments), before, strict=True):
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


def test_threads_change_nothing():
    weights = [(300, 1, 128, "row", True), (200, 3, 0, "row", False), (400, 2, 64, "row", True)]
    for tokens in (1, 150):
        x = torch.randn(tokens, 1024)
        arguments = linears_arguments(x, None, weights, 1024, 8, x.dtype)
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(run(arguments))
        for one, *others in zip(*outputs, strict=True):
            assert all(torch.equal(one, other) for other in others)


def test_opcheck():
    arguments = linears_arguments(torch.randn(3, 64), None, WEIGHTS[:2], 64, 8, torch.float32)
    q, sx = torch.ops.ternc.quantize_act(arguments[0], 8)
    for given in (arguments[:2], (q, sx)):
        torch.library.opcheck(torch.ops.ternc.linears2.default, (*given, *arguments[2:]))
        one = single((*given, *arguments[2:]), torch.randn(3, 129))
        torch.library.opcheck(torch.ops.ternc.linears1.default, one)


REFUSED = [
    (0, torch.zeros(3, 64, dtype=torch.float64)),
    (1, torch.ones(3, 1)),
    (3, []),
    (8, 5),
    (9, [1, 11]),
    (10, torch.bfloat16),
]


@pytest.mark.parametrize(("position", "value"), REFUSED)
def test_what_linears_refuse(position, value):
    x = torch.zeros(3, 64)
    arguments = list(linears_arguments(x, None, WEIGHTS[:2], 64, 8, torch.float32))
    arguments[position] = value
    for op in (torch.ops.ternc.linears2, linears.reference):
        with pytest.raises((RuntimeError, KernelError), match="linears"):
            op(*arguments)


REFUSED_ALONE = [(5, torch.zeros(5)), (6, torch.zeros(3, 5)), (9, 5), (10, 1), (11, torch.bfloat16)]


@pytest.mark.parametrize(("position", "value"), REFUSED_ALONE)
def test_what_linears1_refuses(position, value):
    x = torch.zeros(3, 64)
    one = list(single(linears_arguments(x, None, WEIGHTS[:1], 64, 8, torch.float32)))
    one[position] = value
    ops = (torch.ops.ternc.linears1, linears1.reference)
    for op in ops[: 1 if position == 10 else 2]:  # the reference computes on every layout
        with pytest.raises((RuntimeError, KernelError), match="linears1"):
            op(*one)
