"""Products in Triton's interpreter, on the CPU: equal to the references bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from packed_weights import assert_same
from reference import dequantize_arguments, linear_arguments, random_quantized, token_arguments

from ternc.config import INT8
from ternc.formats import pack
from ternc.runtime import dispatch
from ternc.runtime.ops import (
    dequantize,
    embedding,
    grouped_linear,
    linear,
    quantize_act,
    token_linears,
)

WEIGHTS = [
    # (N, K, planes, group_size, scales)
    (5, 33, 1, 0, "row"),
    (1, 1, 1, 0, "row"),
    (129, 3, 1, 0, "tensor"),
    (40, 300, 1, 128, "row"),
    (9, 50, 1, 16, "row"),
    (9, 77, 1, 6, "row"),
    (7, 40, 2, 0, "tensor"),
    (40, 700, 2, 128, "row"),
    (33, 300, 3, 0, "row"),
    (3, 600, 3, 256, "row"),
    (6, 24, 3, 8, "row"),
]


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_activations(shape, tokens, bits):
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(*shape), "cuda")
    x = torch.randn(tokens, shape[1])
    if tokens > 1:
        x[1, 0] = torch.nan
    arguments = linear_arguments(x, packed, torch.randn(shape[0]), bits)
    assert_same(kernels.linear(*arguments), linear.reference(*arguments))


@inside
@pytest.mark.parametrize("tokens", [1, 3])
def test_half_precision(tokens):
    """The interpreter cuts float32 to bfloat16 without rounding: that type is left to GPUs."""
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(40, 300, 1), "cuda")
    arguments = linear_arguments(torch.randn(tokens, 300, dtype=torch.float16), packed)
    assert_same(kernels.linear(*arguments), linear.reference(*arguments))
    kernel = "triton_gemv" if tokens == 1 else "triton_gemm"
    kernels.linear(*arguments)
    assert dispatch.last_kernel(packed.weight) == kernel


@inside
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("resident", [0, 4])
def test_split_and_step(split, step, resident):
    """Every way to walk over K gives the same integers: 5 tiles, 5 chunks."""
    from ternc.runtime.kernels.triton.gemm_config import GemmConfig
    from ternc.runtime.kernels.triton.linear_gemm import linear_gemm, quantize
    from ternc.runtime.kernels.triton.product import Product
    from ternc.runtime.kernels.triton.weight import Weight

    packed = pack(random_quantized(150, 1200, 1), "cuda")
    arguments = linear_arguments(torch.randn(5, 1200), packed)
    weight = Weight.of(*arguments[1:4], 150, 1200, 0, packed.layout)
    config = GemmConfig(32, 8, split, 2, 2, None, step, 0, resident)
    product = Product((weight,), None, (torch.empty(5, 150),))
    integers = quantize(arguments[0], product, 8, config)
    linear_gemm(integers, product, config)
    expected = linear.reference(*arguments)
    assert_same(product.outputs[0], expected)
    product.outputs[0].fill_(torch.nan)
    linear_gemm(dataclasses.replace(integers, counts=None), product, config)
    assert_same(product.outputs[0], expected)


@inside
@pytest.mark.parametrize(
    ("columns", "planes", "group_size"),
    [(1200, 1, 128), (1100, 3, 128), (700, 2, 256), (300, 1, 0)],
    ids=str,
)
@pytest.mark.parametrize(
    ("split", "step", "tensor_map"), [(1, 2, False), (2, 1, False), (3, 1, True)], ids=str
)
def test_ways_to_multiply(columns, planes, group_size, split, step, tensor_map):
    """Sums or codes times the multipliers, pairs of them or an odd number, q by pointers or not."""
    from ternc.runtime.kernels.triton.gemm_config import GemmConfig
    from ternc.runtime.kernels.triton.linear_gemm import linear_gemm, quantize
    from ternc.runtime.kernels.triton.product import Product
    from ternc.runtime.kernels.triton.weight import Weight

    packed = pack(random_quantized(50, columns, planes, group_size), "cuda")
    weight = Weight.of(
        packed.weight, packed.scale, packed.multiplier, 50, columns, group_size, packed.layout
    )
    for tokens, warps, sums in ((16, 2, None), (32, 4, None), (32, 4, True)):
        config = GemmConfig(32, tokens, split, warps, 2, None, step, 0, 0, tensor_map, sums)
        assert config.sums == (sums or tokens == 16)
        arguments = linear_arguments(torch.randn(tokens // 2 + 3, columns), packed)
        product = Product((weight,), None, (torch.empty(tokens // 2 + 3, 50),))
        linear_gemm(quantize(arguments[0], product, 8, config), product, config)
        assert_same(product.outputs[0], linear.reference(*arguments))


@inside
def test_tiles_of_integers_end_within_their_storage():
    from ternc.runtime.kernels.triton.linear_gemm import tiles_of
    from ternc.runtime.kernels.triton.quantize_act import empty_rows

    q = empty_rows((3, 11, 48), torch.device("cpu")).view(33, 48)
    assert tiles_of(q, [64, 256]).shape == [64, 48]
    assert tiles_of(q[1:], [32, 256]).shape == [32, 48]
    assert tiles_of(q[1:], [64, 256]).shape == [32, 48]
    assert tiles_of(q.clone(), [64, 256]).shape == [33, 48]


@inside
@pytest.mark.parametrize(
    "shape", [*WEIGHTS, (6, 300, 3, 8, "free"), (9, 50, 1, 16, "free"), (9, 300, 8)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 20])
def test_floating_point_activations(shape, tokens):
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(*shape), "cuda")
    x = torch.randn(tokens, shape[1])
    x[0, 0] = torch.inf
    arguments = linear_arguments(x, packed, None, 0)
    y = kernels.linear(*arguments)
    assert dispatch.last_kernel(packed.weight) == "triton_float"
    expected = linear.reference(*arguments)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-3)


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 127, 300, 17000])
def test_quantize_act(dtype, bits, columns):
    from ternc.runtime.kernels.triton import quantize_act as kernels

    x = torch.randn(5, columns, dtype=dtype)
    x[1], x[2, 0], x[3, 0] = 0, torch.nan, torch.inf
    q, scale = kernels.quantize_act(x, bits)
    expected_q, expected_scale = quantize_act.reference(x, bits)
    assert torch.equal(q, expected_q)
    assert_same(scale, expected_scale)


@inside
@pytest.mark.parametrize(
    "shape", [*WEIGHTS, (6, 24, 3, 8, "free"), (9, 1030, 8), (5, 7, 8, 0, "tensor")], ids=str
)
def test_dequantize_and_embedding(shape):
    from ternc.runtime.kernels.triton import dequantize as kernels

    arguments = dequantize_arguments(pack(random_quantized(*shape), "cuda"))
    assert_same(kernels.dequantize(*arguments), dequantize.reference(*arguments))
    ids = torch.randint(0, shape[0], (3, 2), dtype=torch.int32)
    for indices in (ids.t(), ids[0, 0].long(), ids[:0]):
        seen = kernels.embedding(indices, *arguments)
        assert dispatch.last_kernel(arguments[0]) == "triton_embedding"
        assert_same(seen, embedding.reference(indices, *arguments))


@inside
@pytest.mark.parametrize("shape", [(33, 700, 2, 128), (129, 256, 1, 0), (9, 77, 1, 8)], ids=str)
@pytest.mark.parametrize("kind", ["", "rms", "layer"])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_token_linears(shape, kind, activation):
    from ternc.runtime.kernels.triton import token_linears as kernels

    weights = [pack(random_quantized(*shape), "cuda") for _ in range(2)]
    arguments = token_arguments(torch.randn(1, shape[1]) + 0.3, weights, kind, activation)
    expected, seen = token_linears.reference(*arguments), kernels.token_linears(*arguments)
    assert dispatch.last_kernel(weights[1].weight) == "triton_gemv"
    for y, exact in zip(seen, expected, strict=True):
        if not kind and not activation:
            assert_same(y, exact)
        assert (y - exact).norm() <= 3e-3 * exact.norm()
    if activation:
        alone = token_arguments(arguments[0], weights[:1], kind, activation)
        h, exact = kernels.token_linears(*alone), token_linears.reference(*alone)
        assert (h - exact).norm() <= 3e-3 * exact.norm()


@inside
def test_what_no_kernel_takes_goes_to_the_reference():
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(9, 50, 1), "cpu")
    arguments = linear_arguments(torch.randn(2, 50), packed)
    assert_same(kernels.linear(*arguments), linear.reference(*arguments))
    assert dispatch.last_kernel(packed.weight) == "reference"


@inside
@pytest.mark.parametrize("shape", [(9, 50, 1, 16), (70, 300, 2, 128), (6, 24, 3, 8)], ids=str)
@pytest.mark.parametrize("tokens", [1, 20])
def test_free_scales(shape, tokens):
    from ternc.runtime.kernels.triton import linear as kernels

    packed = pack(random_quantized(*shape, "free"), "cuda")
    x = torch.randn(tokens, shape[1])
    x[0, 0] = torch.nan if tokens > 1 else 1.0
    arguments = linear_arguments(x, packed, torch.randn(shape[0]))
    expected = linear.reference(*arguments)
    seen = kernels.linear(*arguments)
    assert dispatch.last_kernel(packed.weight) == "triton_free"
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@inside
@pytest.mark.parametrize(("planes", "group_size"), [(1, 0), (2, 128), (3, 24)])
@pytest.mark.parametrize("ends", [None, [0, 7, 7, 28], [3, 3, 3, 3], [9, 9, 30, 30]], ids=str)
def test_grouped_linear(planes, group_size, ends, register_ops):
    """Experts without rows, rows without an expert, more rows than a tile has."""
    from ternc.runtime.kernels.triton import linear_grouped as kernels

    experts, rows, columns, tokens = len(ends or "four"), 70, 300, 30
    stack = (experts * grouped_linear.padded_rows(rows), columns, planes, group_size)
    quantized = random_quantized(*stack)
    packed, known = pack(quantized, "cuda"), pack(quantized, "cpu")
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    x = torch.randn(tokens, columns)

    def run(function, one, x, sx):
        tensors = (x, sx, offsets, one.weight, one.scale, one.multiplier)
        return function(*tensors, experts, rows, group_size, 8, one.layout, torch.float32)

    for given in ((x.view(2, 15, columns), None), quantize_act.reference(x, 8)):
        y = run(kernels.grouped_linear, packed, *given)
        assert_same(y, run(grouped_linear.grouped_linear, known, *given))


OTHER_STACKS = [
    # planes, group_size, scales, activation_bits
    (1, 0, "row", 0),
    (1, 24, "row", 0),
    (2, 128, "row", 0),
    (3, 24, "free", 0),
    (INT8, 0, "row", 0),
    (1, 128, "free", 8),
    (3, 24, "free", 4),
    (INT8, 0, "row", 8),
]


@inside
@pytest.mark.parametrize("stack", OTHER_STACKS, ids=str)
@pytest.mark.parametrize("ends", [None, [0, 4, 19, 19]], ids=str)
def test_grouped_linear_of_other_stacks(stack, ends, register_ops):
    """Free scales, int8 experts, floating-point rows."""
    from ternc.runtime.kernels.triton import linear_grouped as kernels

    planes, group_size, scales, bits = stack
    experts, rows, columns, tokens = 4, 65, 150, 20
    padded = experts * grouped_linear.padded_rows(rows)
    quantized = random_quantized(padded, columns, planes, group_size, scales)
    packed, known = pack(quantized, "cuda"), pack(quantized, "cpu")
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    x = torch.randn(tokens, columns)
    x[1, 0] = torch.nan
    for given in [(x, None)] + ([quantize_act.reference(x, bits)] if bits else []):
        seen, expected = (
            function(*given, offsets, one.weight, one.scale, one.multiplier, experts, rows,
                     group_size, bits, one.layout, torch.float32)
            for function, one in ((kernels.grouped_linear, packed),
                                  (grouped_linear.grouped_linear, known))
        )  # fmt: skip
        assert dispatch.last_kernel(packed.weight) == "triton_grouped_any"
        if bits and scales != "free":
            assert_same(seen, expected)
        else:
            torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
