"""ternc::linear on the GPU against the eager reference: bit for bit with integer activations."""

from __future__ import annotations

import pytest
import torch
from packed_weights import assert_same, packed_on_gpu
from reference import linear_arguments, random_quantized

from ternc.formats import pack
from ternc.formats.int8 import fit_int8
from ternc.modules.linear import TernaryLinear
from ternc.runtime import dispatch
from ternc.runtime.ops import linear as linear_op

pytestmark = pytest.mark.gpu

WEIGHTS = [
    # (N, K, planes, group_size, scales)
    (1, 1, 1, 0, "row"),
    (3, 127, 1, 0, "row"),
    (127, 129, 1, 0, "tensor"),
    (129, 3, 1, 0, "row"),
    (200, 1000, 1, 128, "row"),
    (64, 384, 1, 256, "row"),
    (70, 520, 1, 32, "row"),
    (9, 77, 1, 6, "row"),
    (129, 257, 2, 0, "row"),
    (130, 700, 2, 128, "row"),
    (65, 300, 3, 0, "tensor"),
    (131, 900, 3, 128, "row"),
    (40, 200, 3, 64, "row"),
]

TOKENS = [1, 2, 3, 7, 13, 37, 64, 65, 130, 257]


# Types differ in how they are read and written: every weight and tile in one of them, some in the
# others.
TYPED_WEIGHTS = [(shape, torch.bfloat16) for shape in WEIGHTS]
TYPED_WEIGHTS += [(shape, torch.float32) for shape in WEIGHTS[::2]]
TYPED_WEIGHTS += [(shape, torch.float16) for shape in WEIGHTS[1::2]]
ANY_WEIGHT = pytest.mark.parametrize(("shape", "dtype"), TYPED_WEIGHTS, ids=str)


@ANY_WEIGHT
def test_integer_activations(shape, dtype):
    packed = packed_on_gpu(*shape)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype) if shape[0] % 2 else None
    for tokens in TOKENS if dtype == torch.bfloat16 else (1, 13, 130):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        for bits in (8, 4):
            arguments = linear_arguments(x, packed, bias, bits)
            assert_same(torch.ops.ternc.linear(*arguments), linear_op.reference(*arguments))


OTHER_WEIGHTS = [(129, 300, 8), (1000, 4096, 8), (70, 300, 3, 128, "free"), (9, 50, 1, 16, "free")]
TYPED_OTHERS = [
    (shape, dtype) for shape in OTHER_WEIGHTS for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("shape", "dtype"), TYPED_WEIGHTS + TYPED_OTHERS, ids=str)
def test_floating_point_activations(shape, dtype):
    """Within the sum of one rounding of the output and the fp32 accumulation of K terms."""
    packed = packed_on_gpu(*shape)
    for tokens in (1, 5, 70) if dtype == torch.bfloat16 else (5,):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        arguments = linear_arguments(x, packed, None, 0)
        expected = linear_op.reference(*arguments)
        y = torch.ops.ternc.linear(*arguments)
        assert dispatch.last_kernel(packed.weight) == "triton_float"
        norm = expected.float().norm()
        assert (y.float() - expected.float()).norm() <= norm * max(torch.finfo(dtype).eps, 2e-6)


@pytest.mark.parametrize("bits", [8, 4, 0])
@pytest.mark.parametrize("tokens", [1, 5])
def test_non_finite_rows(tokens, bits):
    packed = packed_on_gpu(65, 300, 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(tokens, 300, device="cuda")
        x[0, 7] = bad
        y = torch.ops.ternc.linear(*linear_arguments(x, packed, None, bits))
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()


def test_zero_rows():
    packed = packed_on_gpu(65, 300, 1)
    x = torch.zeros(1, 300, device="cuda")
    assert not torch.ops.ternc.linear(*linear_arguments(x, packed)).any()


@pytest.mark.parametrize("shape", [(9, 50, 1, 16), (70, 300, 3, 128), (200, 700, 2, 6)], ids=str)
def test_free_scales(shape):
    packed = packed_on_gpu(*shape, "free")
    for tokens in (1, 6, 90):
        x = torch.randn(tokens, shape[1], device="cuda")
        arguments = linear_arguments(x, packed)
        y = torch.ops.ternc.linear(*arguments)
        assert dispatch.last_kernel(packed.weight) == "triton_free"
        torch.testing.assert_close(y, linear_op.reference(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 100, 2, 32), (70, 300, 3, 128)], ids=str)
def test_free_planes(shape):
    layer = TernaryLinear.from_quantized(random_quantized(*shape, "planes"))
    x, state = torch.randn(9, shape[1]), layer.state_dict()
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(v.cpu(), state[name]) for name, v in layer.state_dict().items())


LARGE = [(4096, 4096), (2560, 6912), (6912, 2560)]


@pytest.mark.parametrize(
    ("shape", "planes", "group_size"),
    [(shape, 1, group_size) for shape in LARGE for group_size in (0, 128)]
    + [((4096, 4096), 2, 0), ((2560, 6912), 2, 128), ((6912, 2560), 3, 128)],
    ids=str,
)
def test_large(shape, planes, group_size):
    """Every regime, split K included; the output buffer's memory held NaN before."""
    packed = packed_on_gpu(*shape, planes, group_size)
    for tokens in (1, 4, 16, 33, 100, 200, 1100):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        arguments = linear_arguments(x, packed)
        expected = linear_op.reference(*arguments)
        for _ in range(2):
            poison = torch.full((tokens, shape[0]), torch.nan, device="cuda", dtype=x.dtype)
            del poison
            assert_same(torch.ops.ternc.linear(*arguments), expected)
        kernel = "triton_gemv" if tokens == 1 else "triton_gemm"
        assert dispatch.last_kernel(packed.weight) == kernel


@pytest.mark.parametrize("shape", [(129, 300), (65, 7), (1000, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights(shape, dtype):
    packed = pack(fit_int8(torch.randn(shape, device="cuda")), "cuda")
    bias = torch.randn(shape[0], device="cuda")
    for tokens in (1, 5, 16, 60, 300):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        arguments = linear_arguments(x, packed, bias)
        y = torch.ops.ternc.linear(*arguments)
        assert dispatch.last_kernel(packed.weight) == "triton_int8"
        assert_same(y, linear_op.reference(*arguments))


def test_shapes_of_x():
    packed = packed_on_gpu(33, 100, 1)
    x = torch.randn(2, 3, 100, device="cuda")
    assert torch.ops.ternc.linear(*linear_arguments(x, packed)).shape == (2, 3, 33)
    assert torch.ops.ternc.linear(*linear_arguments(x[0, 0], packed)).shape == (33,)
    assert torch.ops.ternc.linear(*linear_arguments(x[:, :0], packed)).shape == (2, 0, 33)
    strided = torch.randn(100, 5, device="cuda").T
    arguments = linear_arguments(strided, packed)
    assert_same(torch.ops.ternc.linear(*arguments), linear_op.reference(*arguments))


@pytest.mark.parametrize(("planes", "group_size"), [(1, 0), (1, 128), (2, 128), (3, 0), (3, 128)])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_inline_asm_equals_plain_triton(planes, group_size, tokens, monkeypatch):
    from ternc.runtime.kernels.triton import launch

    packed = packed_on_gpu(200, 1000, planes, group_size)
    x = torch.randn(tokens, 1000, device="cuda")
    arguments = linear_arguments(x, packed)
    with_asm = torch.ops.ternc.linear(*arguments)
    monkeypatch.setattr(launch, "INLINE_ASM", False)
    assert_same(torch.ops.ternc.linear(*arguments), with_asm)


def test_any_number_of_tokens_takes_the_same_kernel():
    """Within a tile size, no M compiles anew: neither 1 nor a multiple of 16 is special."""
    from ternc.runtime.kernels.triton.linear_gemm import gemm

    packed = packed_on_gpu(256, 512, 1)
    compiled = []
    for tokens in (33, 48, 51, 64, 34):
        x = torch.randn(tokens, 512, device="cuda")
        torch.ops.ternc.linear(*linear_arguments(x, packed))
        compiled.append(len(gemm.device_caches[0][0]))
    assert len(set(compiled)) == 1
