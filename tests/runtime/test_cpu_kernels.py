"""Every instruction set of csrc/, forced in turn, against the eager references."""

from __future__ import annotations

import pytest
import torch
from reference import (
    assert_as_good_as,
    dequantize_arguments,
    linear_arguments,
    random_quantized,
)

from ternc.config import INT8, LARGEST_CODE
from ternc.formats import Quantized, pack
from ternc.runtime import cpu
from ternc.runtime.ops import dequantize, linear, quantize_act

pytestmark = pytest.mark.usefixtures("every_isa")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
DENSE = 14
PLANES = pytest.mark.parametrize("planes", [1, 2, 3, INT8])
TOKENS = (0, 1, 2, 3, 4, 5, 17, 33)
WEIGHTS = [
    # rows, columns, group_size, scales
    (1, 1, 0, "row"),
    (3, 3, 0, "tensor"),
    (127, 129, 32, "row"),
    (129, 127, 128, "row"),
    (130, 300, 128, "tensor"),
    (65, 260, 128, "free"),
    (70, 1100, 0, "row"),
]
ANY_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS, ids=str)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed_weight(weight, planes):
    rows, columns, group_size, scales = weight
    return pack(random_quantized(rows, columns, planes, group_size, scales), "cpu")


def assert_equal(seen, expected):
    assert torch.equal(seen.isnan(), expected.isnan())
    assert torch.equal(seen.nan_to_num(), expected.nan_to_num())


@ANY_WEIGHT
@PLANES
@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_activations_are_bit_for_bit(weight, planes, dtype, bits):
    packed = packed_weight(weight, planes)
    for tokens in TOKENS:
        x = torch.randn(tokens, weight[1]).to(dtype)
        bias = [None, torch.randn(weight[0]), torch.randn(weight[0]).to(dtype)][tokens % 3]
        arguments = linear_arguments(x, packed, bias, bits)
        assert_equal(torch.ops.ternc.linear(*arguments), linear.reference(*arguments))


@ANY_WEIGHT
@PLANES
@DTYPES
def test_float_activations(weight, planes, dtype):
    packed = packed_weight(weight, planes)
    w = dequantize.reference(*dequantize_arguments(packed, torch.float32)).double()
    for tokens in TOKENS[1:]:
        x = torch.randn(tokens, weight[1]).to(dtype)
        exact = x.double() @ w.T
        y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, 0))
        low = (x.float() @ w.float().T).to(dtype)
        assert_as_good_as(y, low, exact, atol=3e-7 * weight[1] ** 0.5 * exact.abs().max().item())


HARD = {
    "normal": lambda x: x,
    "outlier": lambda x: x.index_fill(1, torch.tensor([500]), 60.0),
    "huge outlier": lambda x: x.index_fill(1, torch.tensor([500]), 3e4),
    "small half": lambda x: torch.cat([x[:, :551], x[:, 551:] / 128], 1),
    "smaller half": lambda x: torch.cat([x[:, :551], x[:, 551:] / 4096], 1),
    "heavy tails": lambda x: x / torch.randn(x.shape).abs().clamp_min(1e-3),
    "any size": lambda x: x * 10 ** (8 * torch.rand(x.shape) - 4),
    "one sided": lambda x: x.relu() + 10,
    "small": lambda x: x * 2e-6,
    "half denormal": lambda x: torch.cat([x[:, :551], x[:, 551:] * 1e-40], 1),
    "denormal": lambda x: x * 1e-39,
}


@pytest.mark.parametrize("group_size", [0, 128])
@DTYPES
@pytest.mark.parametrize("kind", HARD)
def test_float_activations_of_any_range(group_size, dtype, kind, threads):
    """As good as F.linear, also in rows that read only the small values (fixed point is not)."""
    packed = packed_weight((300, 1102, group_size, "row"), 1)
    w = dequantize.reference(*dequantize_arguments(packed, torch.float32)).double()
    x = HARD[kind](torch.randn(18, 1102)).to(dtype)
    exact, low = x.double() @ w.T, (x.float() @ w.float().T).to(dtype)
    few = w[:, 500] == 0
    for tokens in (1, 18):
        arguments = linear_arguments(x[:tokens], packed, None, 0)
        y = torch.ops.ternc.linear(*arguments)
        threads(2)
        assert torch.equal(y, torch.ops.ternc.linear(*arguments))
        threads(1)
        for rows in (few, ~few):
            error = (y - exact[:tokens])[:, rows].norm()
            low_error = (low[:tokens] - exact[:tokens])[:, rows].norm()
            assert error <= 1.5 * low_error + 1e-7 * exact[:tokens, rows].norm()


@pytest.mark.parametrize("columns", [1024, 4096])
def test_values_of_like_size_lose_less_than_their_documented_share(columns):
    """The bound of csrc/generic/digits.h for fp32, in three digits or four."""
    packed = packed_weight((128, columns, 0, "row"), 1)
    w = dequantize.reference(*dequantize_arguments(packed, torch.float32)).double()
    normal = torch.randn(4, columns)
    sign = normal.sign()
    for x in (normal, normal.relu(), torch.rand(4, columns), normal.abs().log1p() * sign, sign):
        y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, 0))
        exact = x.double() @ w.T
        assert (y - exact).norm() <= 2.4e-7 * exact.norm()


@pytest.mark.parametrize("weight", [(1, 1, 0), (127, 129, 32), (161, 1100, 0)], ids=str)
def test_one_plane_in_its_dense_form(weight):
    rows, columns, group_size = weight
    quantized = random_quantized(rows, columns, 1, group_size)
    dense, lanes = pack(quantized, DENSE), pack(quantized, "cpu")
    assert dense.layout != lanes.layout
    for tokens in TOKENS:
        x, bias = torch.randn(tokens, columns), torch.randn(rows)
        for bits in (8, 4):
            y = torch.ops.ternc.linear(*linear_arguments(x, dense, bias, bits))
            assert_equal(y, torch.ops.ternc.linear(*linear_arguments(x, lanes, bias, bits)))
        y = torch.ops.ternc.linear(*linear_arguments(x, dense, bias, 0))
        expected = linear.reference(*linear_arguments(x, dense, bias, 0))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    w = torch.ops.ternc.dequantize(*dequantize_arguments(dense))
    assert torch.equal(w, torch.ops.ternc.dequantize(*dequantize_arguments(lanes)))


def test_the_dense_form_takes_no_free_scales():
    packed = pack(random_quantized(65, 260, 1, 128, "free"), DENSE)
    with pytest.raises(RuntimeError, match="layout 14"):
        torch.ops.ternc.linear(*linear_arguments(torch.randn(1, 260), packed))


@pytest.mark.parametrize("bits", [8, 4, 0])
def test_rows_that_are_not_finite_or_zero(bits):
    packed = packed_weight((130, 1100, 0, "row"), 1)
    x = torch.randn(9, 1100)
    x[8, 3] = 3e7
    expected = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))
    x[1, 500], x[3, 0], x[6] = torch.nan, -torch.inf, 0.0
    y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))
    assert y[[1, 3]].isnan().all()
    assert (y[6] == 0).all()
    others = [0, 2, 4, 5, 7, 8]
    assert torch.equal(y[others], expected[others])


@PLANES
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(planes, sign):
    columns, most = 131_072, LARGEST_CODE[planes]
    multiplier = torch.full((2, columns // 128), 127 // most, dtype=torch.uint8)
    for groups in (0, 128):
        weight = Quantized(
            torch.full((2, columns), sign * most, dtype=torch.int8),
            torch.ones(2),
            multiplier if groups else None,
            groups,
            planes,
        )
        for tokens in (1, 4):
            x = torch.full((tokens, columns), -3.0)
            y = torch.ops.ternc.linear(*linear_arguments(x, pack(weight, "cpu")))
            total = -127 * columns * sign * most * (127 // most if groups else 1)
            expected = torch.tensor(float(total)) * (torch.tensor(3.0) / torch.tensor(127.0))
            assert (y == expected).all()


@pytest.mark.parametrize("bits", [8, 0])
def test_shapes_and_strides_of_x(bits):
    packed = packed_weight((127, 129, 32, "row"), 2)
    x = torch.randn(2, 129, 3)
    y = torch.ops.ternc.linear(*linear_arguments(x.transpose(1, 2), packed, None, bits))
    dense = x.transpose(1, 2).reshape(6, 129)
    assert torch.equal(
        y.view(6, 127), torch.ops.ternc.linear(*linear_arguments(dense, packed, None, bits))
    )
    assert torch.ops.ternc.linear(*linear_arguments(x[0, :, 0], packed, None, bits)).shape == (127,)


@pytest.mark.parametrize("bits", [8, 4, 0])
@pytest.mark.parametrize("weight", [(300, 1028, 0, "row"), (40, 4096, 128, "row")], ids=str)
def test_threads_change_nothing(threads, bits, weight):
    packed = packed_weight(weight, 1)
    x = torch.randn(150, weight[1])
    outputs = []
    for count in (1, 2, 3):
        threads(count)
        outputs.append(torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 1}, r"layout 1 \(rows\) is the form at rest"),
        ({"layout": 7}, "layout"),
        ({"group_size": 6}, "multiple of 4"),
        ({"activation_bits": 3}, "activation_bits=3"),
        ({"out_features": 200}, "layout 11 of \\[200, 129\\]"),
        ({"scale": torch.ones(5)}, "scale"),
        ({"bias": torch.ones(5)}, "bias"),
        ({"x": torch.zeros(2, 129, dtype=torch.float64)}, "x is"),
        ({"x": torch.zeros(2, 131_073)}, "131,072"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_kernels_refuse(change, message):
    packed = packed_weight((127, 129, 0, "row"), 1)
    names = ["x", "weight", "scale", "multiplier", "bias"]
    names += ["out_features", "group_size", "activation_bits", "layout"]
    arguments = dict(zip(names, linear_arguments(torch.zeros(2, 129), packed), strict=True))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternc.linear(*(arguments | change).values())


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_act(dtype, bits):
    for shape in [(5, 1), (4, 127), (2, 3, 1000), (0, 5)]:
        x = torch.randn(shape).to(dtype)
        if shape[0] == 4:
            x[1, 3], x[2], x[3] = torch.inf, 0.0, 1e-38  # the last: 127 / max|x| overflows
        seen = torch.ops.ternc.quantize_act(x, bits)
        for part, expected in zip(seen, quantize_act.reference(x, bits), strict=True):
            assert (part.dtype, part.shape) == (expected.dtype, expected.shape)
            assert_equal(part, expected)


def test_every_half_is_read_exactly():
    x = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    packed = pack(Quantized(torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, 0, 1), "cpu")
    y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, 0))
    assert_equal(y, torch.where(x.isfinite(), x, torch.nan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_halves(dtype):
    ties = torch.arange(65_536, dtype=torch.int32) << 16 | 0x8000  # halfway between two bf16
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (halves[1:] + halves[:-1]) / 2  # halfway between two fp16
    edge = torch.tensor([65_519.9, 65_520.0, 1e38, 2.0**-25, 2.0**-24])
    bits = torch.randint(-(2**31), 2**31, (30_000,)).to(torch.int32)
    scale = torch.cat([ties.view(torch.float32), middle, edge, bits.view(torch.float32)])
    codes = torch.ones(len(scale), 1, dtype=torch.int8)
    w = torch.ops.ternc.dequantize(
        *dequantize_arguments(pack(Quantized(codes, scale, None, 0, 1), "cpu"), dtype)
    )
    assert_equal(w[:, 0], scale.to(dtype))


@ANY_WEIGHT
@PLANES
@DTYPES
@pytest.mark.parametrize("at_rest", [False, True])
def test_dequantize(weight, planes, dtype, at_rest):
    rows, columns, group_size, scales = weight
    quantized = random_quantized(rows, columns, planes, group_size, scales)
    arguments = dequantize_arguments(pack(quantized, planes if at_rest else "cpu"), dtype)
    seen = torch.ops.ternc.dequantize(*arguments)
    assert torch.equal(seen, dequantize.reference(*arguments))


def test_invalid_base_3_bytes_are_zeros():
    packed = pack(random_quantized(2, 10, 1), 1)
    packed.weight[0, 1, 0] = 250
    w = torch.ops.ternc.dequantize(*dequantize_arguments(packed, torch.float32))
    assert (w[1, :5] == 0).all()
    assert torch.equal(w, dequantize.reference(*dequantize_arguments(packed, torch.float32)))


def test_the_kernel_that_ran_is_recorded(every_isa):
    packed = packed_weight((3, 3, 0, "tensor"), 1)
    cpu.forget_kernel(packed.weight)
    assert cpu.last_kernel(packed.weight) is None
    torch.ops.ternc.linear(*linear_arguments(torch.randn(1, 3), packed))
    assert cpu.last_kernel(packed.weight) == every_isa
    cpu.forget_kernel(packed.weight)
    assert cpu.last_kernel(packed.weight) is None
