"""Fused quantisation and linears in Triton's interpreter, on the CPU, against the references."""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED, inside, outside, run_in_the_interpreter
from packed_weights import assert_same
from reference import random_quantized

from ternc.formats import pack
from ternc.formats.int8 import fit_int8
from ternc.runtime.ops import (
    activate_quantize,
    hadamard,
    linears,
    linears1,
    norm_quantize,
    quantize_act,
)

if INTERPRETED:  # functions of a kernel are looked up in the module
    import triton
    import triton.language as tl

    from ternc.runtime.kernels.triton.quantize_act import for_one_rounding, row_scale

    @triton.jit
    def store_inverses(t_ptr, inverse_ptr):
        """The factor of rows of bf16 whose largest magnitudes are t."""
        t = tl.load(t_ptr + tl.program_id(0))
        inverse, _ = row_scale(t, 127.0)
        tl.store(inverse_ptr + tl.program_id(0), for_one_rounding(inverse, t))

    @triton.jit
    def store_fma(x_ptr, y_ptr):
        """y = x * x - y, rounded once."""
        x = tl.load(x_ptr)
        tl.store(y_ptr, tl.fma(x, x, -tl.load(y_ptr)))


ROTATIONS = [(1, 0), (129, 0), (768, 0), (6, 2), (192, 64), (768, 256), (4608, 512), (4096, 4096)]
ROTATIONS += [(20480, 2048)]
"""(width, block of the Hadamard transform); block 0: none."""


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def random_signs(width):
    return torch.randint(0, 2, (width,), dtype=torch.int8) * 2 - 1


def assert_close(q, sx, expected):
    """q differs by 1 at most, in at most 0.1 % of elements (one, where they are few)."""
    difference = (q.int() - expected[0].int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= max(1, 1e-3 * q.numel())
    torch.testing.assert_close(sx, expected[1], rtol=4e-3, atol=0, equal_nan=True)


@inside
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norm_quantize(rotation, dtype):
    from ternc.runtime.kernels.triton import fused_quantize as kernels

    width, block = rotation
    x = (torch.randn(5, width) * 3 + 1).to(dtype)
    x[1, 0], x[2] = torch.nan, 0
    gain, bias = torch.randn(width), torch.randn(width).to(dtype)
    signs = random_signs(width) if block else None
    for kind, given, offset, round_first, bits in (
        ("rms", (gain, None), 1.0, True, 8),
        ("layer", (gain.to(dtype), bias), 0.0, False, 8),
        ("layer", (None, None), 0.0, False, 4),
    ):
        rest = (kind, 1e-5, offset, round_first, signs, block, bits, True)
        y, q, sx = kernels.norm_quantize(x, *given, *rest)
        y_expected, *expected = norm_quantize.reference(x, *given, *rest)
        if dtype == torch.float32:
            torch.testing.assert_close(y, y_expected, rtol=4e-6, atol=4e-6, equal_nan=True)
        else:  # statistics of few rows are the reference's, whatever the order of their sums
            assert_same(y, y_expected)
        assert_close(q, sx, expected)


@inside
def test_the_largest_value_of_few_rows_rounds_as_the_reference():
    """Rows whose largest value lies next to a tie: two bf16 parts give many the other neighbour."""
    from ternc.runtime.kernels.triton import fused_quantize as kernels

    x, signs = torch.randn(2048, 4096).half(), random_signs(4096)
    largest = hadamard.transform(x.double() * signs, 4096).abs().amax(-1)
    mantissa, _ = torch.frexp(largest)
    from_tie = (mantissa * 2**11 % 1 - 0.5).abs()
    x = x[from_tie.topk(8, largest=False).indices]
    arguments = (x, None, "none", signs, 4096, 8)
    q, sx = kernels.activate_quantize(*arguments)
    expected = activate_quantize.reference(*arguments)
    assert torch.equal(sx, expected[1])
    assert_close(q, sx, expected)


def rounds_fma_twice():
    x, rest = torch.tensor([1 + 2.0**-12]), torch.tensor([1 + 2.0**-11])
    store_fma[(1,)](x, rest)
    return rest.item() != 2.0**-24


@inside
@pytest.mark.parametrize("exponent", [-120, 0, 120])
def test_one_rounding_of_bf16_rows(exponent):
    """Products that are not rounded before they become integers, of every t and every x."""
    if rounds_fma_twice():
        pytest.skip("this Triton's interpreter rounds the product inside an fma")
    t = (torch.arange(128.0, 256.0) * 2.0**exponent)[:, None]
    smaller = torch.arange(128.0, 256.0) * torch.tensor([[2.0**-k] for k in range(10)])
    x = torch.cat([t, (2.0**exponent * smaller.reshape(1, -1)).minimum(t)], 1)
    assert torch.equal(x.bfloat16().float(), x)
    inverse = torch.empty_like(t)
    store_inverses[(len(t),)](t, inverse)
    q = (x.double() * inverse.double()).round()
    assert torch.equal(q, quantize_act.reference(x, 8)[0].double())


@inside
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_activate_quantize(rotation, activation):
    from ternc.runtime.kernels.triton import fused_quantize as kernels

    width, block = rotation
    both = torch.randn(5, 2 * width, dtype=torch.float16)
    gate, up = both.chunk(2, -1)
    signs = random_signs(width) if block else None
    for bits in (8, 4):
        arguments = (gate, up if bits == 8 else None, activation, signs, block, bits)
        assert_close(
            *kernels.activate_quantize(*arguments), activate_quantize.reference(*arguments)
        )


@inside
@pytest.mark.parametrize("rotation", [(192, 64), (4608, 512)], ids=str)
def test_rows_loaded_ahead(rotation, monkeypatch):
    """Programs that hold the next tile of their rows give what others give."""
    from ternc.runtime.kernels.triton import fused_quantize as kernels

    width, block = rotation
    gate, up = torch.randn(5, 2 * width, dtype=torch.float16).chunk(2, -1)
    signs = random_signs(width)
    rest = (gate, None, None, "rms", 1e-5, 0.0, True, signs, block, 8, True)
    calls = (
        lambda: kernels.activate_quantize(gate, up, "silu", signs, block, 8),
        lambda: kernels.norm_quantize(*rest),
    )
    expected = [call() for call in calls]
    config = kernels.RowsConfig(4, 1, resident=2, ahead=True)
    monkeypatch.setattr(kernels, "choose", lambda *_: config)
    for call, known in zip(calls, expected, strict=True):
        assert all(map(torch.equal, call(), known))


@inside
@pytest.mark.parametrize("activation", activate_quantize.ACTIVATIONS)
def test_activation_functions(activation):
    """The scale sx of a row of one value says what the function gave."""
    from ternc.runtime.kernels.triton import fused_quantize as kernels

    x = torch.cat([torch.linspace(-20, 20, 41), torch.tensor([-200.0, torch.nan, torch.inf])])
    arguments = (x[:, None], None, activation, None, 0, 8)
    seen, expected = kernels.activate_quantize(*arguments), activate_quantize.reference(*arguments)
    torch.testing.assert_close(seen[1], expected[1], rtol=1e-5, atol=2e-8, equal_nan=True)


@inside
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hadamard(rotation, dtype):
    from ternc.runtime.kernels.triton import rotate as kernels

    width, block = rotation
    rows = 5 * 4096 // width + 3  # more tiles than programs
    x, signs = torch.randn(rows, width).to(dtype), random_signs(width)
    x[1, width // 2] = torch.nan
    z = kernels.hadamard(x, signs, block or 1)
    expected = hadamard.reference(x, signs, block or 1)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-4)
    assert not z[[0, 2]].isnan().any()
    finite = ~(z.isnan() & (torch.arange(rows) == 1)[:, None])
    torch.testing.assert_close(z[finite], expected[finite], rtol=tolerance, atol=tolerance)
    assert z[1].isnan().any()


WEIGHTS = [
    # rows, planes, group_size, scales, bias
    (129, 1, 128, "row", True),
    (65, 1, 128, "row", True),
    (3, 2, 0, "tensor", False),
    (33, 1, 128, "row", False),
]


def inputs_of(tokens, columns, bits):
    """x in floating point, then as integers."""
    x = torch.randn(tokens, columns)
    if tokens > 1:
        x[1, 0] = torch.nan
    return [(x, None)] + ([quantize_act.reference(x, bits)] if bits else [])


def compare(seen, expected, bits):
    if bits:
        assert_same(seen, expected)
    else:
        torch.testing.assert_close(seen, expected, equal_nan=True, rtol=1e-5, atol=1e-3)


@inside
@pytest.mark.parametrize("columns", [1, 260])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [8, 4, 0])
def test_linears(columns, tokens, bits):
    """Some weights share a launch, some do not."""
    from ternc.runtime.kernels.triton import linear as kernels

    packed = [pack(random_quantized(rows, columns, *rest), "cuda") for rows, *rest, _ in WEIGHTS]
    none = torch.empty(0, dtype=torch.uint8)
    rest = (
        [p.weight for p in packed],
        [p.scale for p in packed],
        [none if p.multiplier is None else p.multiplier for p in packed],
        [torch.randn(rows) if bias else torch.empty(0) for rows, *_, bias in WEIGHTS],
        [p.shape[0] for p in packed],
        [p.group_size for p in packed],
        bits,
        [p.layout for p in packed],
        torch.float32,
    )
    for given in inputs_of(tokens, columns, bits):
        expected = linears.reference(*given, *rest)
        for y, y_expected in zip(kernels.linears(*given, *rest), expected, strict=True):
            compare(y, y_expected, bits)


@inside
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [8, 4, 0])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_with_a_residual(tokens, bits, bias):
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(129, 260, 1, 128), "cuda")
    given_bias = torch.randn(129) if bias else None
    rest = (packed.weight, packed.scale, packed.multiplier, given_bias, torch.randn(tokens, 129))
    numbers = (129, 128, bits, packed.layout, torch.float32)
    for given in inputs_of(tokens, 260, bits):
        y = kernels.linears1(*given, *rest, *numbers)
        compare(y, linears1.reference(*given, *rest, *numbers), bits)


@inside
@pytest.mark.parametrize("shape", [(129, 300), (65, 7), (3, 256)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_weights(shape, tokens):
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(fit_int8(torch.randn(shape)), "cuda")
    numbers = (shape[0], 0, 8, packed.layout, torch.float32)
    rest = (packed.weight, packed.scale, None, torch.randn(shape[0]), torch.randn(tokens, shape[0]))
    for given in inputs_of(tokens, shape[1], 8):
        y = kernels.linears1(*given, *rest, *numbers)
        assert_same(y, linears1.reference(*given, *rest, *numbers))
