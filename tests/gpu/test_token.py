"""Products of one token with the norm before and the activation behind them, in one launch."""

from __future__ import annotations

import pytest
import torch
from packed_weights import assert_same, packed_on_gpu
from reference import token_arguments

from ternc.runtime import dispatch
from ternc.runtime.ops import token_linears

pytestmark = pytest.mark.gpu

SHAPES = [
    # (N, K, planes, group_size)
    (1, 1, 1, 0),
    (129, 2560, 1, 0),
    (700, 1000, 1, 128),
    (64, 6912, 1, 0),
    (9, 77, 1, 8),
    (130, 700, 2, 128),
    (131, 900, 3, 0),
]


def op(count):
    return getattr(torch.ops.ternc, f"token_linears{count}")


TYPED_SHAPES = [(shape, torch.bfloat16) for shape in SHAPES]
TYPED_SHAPES += [(shape, torch.float32) for shape in SHAPES[::2]]
TYPED_SHAPES += [(shape, torch.float16) for shape in SHAPES[1::2]]


@pytest.mark.parametrize(("shape", "dtype"), TYPED_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["", "rms", "layer"])
def test_products(shape, dtype, kind):
    """Bit for bit without a norm; with one q may differ by 1 in few elements."""
    weights = [packed_on_gpu(*shape) for _ in range(3)]
    x = torch.randn(1, 1, shape[1], device="cuda", dtype=dtype) + 0.3
    for count in (1, 3) if dtype == torch.bfloat16 else (3,):
        arguments = token_arguments(x, weights[:count], kind, "", bias=count > 1)
        seen = op(count)(*arguments)
        assert dispatch.last_kernel(weights[0].weight) == "triton_gemv"
        expected = token_linears.reference(*arguments)
        if count == 1:
            seen, expected = (seen,), (expected,)
        for y, exact in zip(seen, expected, strict=True):
            if not kind:
                assert_same(y, exact)
            limit = 3e-3 if dtype == torch.float32 else 2e-2
            assert (y - exact).float().norm() <= limit * exact.float().norm()


@pytest.mark.parametrize(("shape", "dtype"), TYPED_SHAPES, ids=str)
def test_gated(shape, dtype):
    check_gated(shape, dtype, "silu", ("", "rms"))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "none"])
def test_activations(activation):
    check_gated((129, 500, 1, 0), torch.float16, activation, ("",))


def check_gated(shape, dtype, activation, kinds):
    weights = [packed_on_gpu(*shape) for _ in range(2)]
    x = torch.randn(1, shape[1], device="cuda", dtype=dtype)
    for kind in kinds:
        arguments = token_arguments(x, weights, kind, activation)
        h = op(1)(*arguments)
        assert dispatch.last_kernel(weights[1].weight) == "triton_gemv"
        expected = token_linears.reference(*arguments)
        limit = 5e-3 if dtype == torch.float32 else 3e-2
        assert (h - expected).float().norm() <= limit * expected.float().norm()
        alone = token_arguments(x, weights[:1], kind, activation)
        h, expected = op(1)(*alone), token_linears.reference(*alone)
        assert (h - expected).float().norm() <= limit * expected.float().norm()


def test_what_one_launch_does_not_take():
    """Several tokens, rows of x too long, weights of two kinds: the separate kernels run."""
    one, other = packed_on_gpu(40, 300, 1), packed_on_gpu(40, 300, 2)
    wide = packed_on_gpu(40, 9000, 1)
    x = torch.randn(3, 300, device="cuda")
    for given, weights in ((x, [one, one]), (x[:1], [one, other]),
                           (torch.randn(1, 9000, device="cuda"), [wide, wide])):  # fmt: skip
        arguments = token_arguments(given, weights, "rms", "silu")
        h, expected = op(1)(*arguments), token_linears.reference(*arguments)
        assert (h - expected).norm() <= 5e-3 * expected.norm()


def test_chain_in_a_graph():
    """Gate, up and down, each kernel directly behind the one whose output it reads."""
    from ternc.runtime.kernels.triton import launch

    width, hidden = 512, 1408
    gates = [[packed_on_gpu(hidden, width, 1) for _ in range(2)] for _ in range(3)]
    downs = [packed_on_gpu(width, hidden, 1) for _ in range(3)]
    given = torch.randn(1, width, device="cuda", dtype=torch.bfloat16)
    rest = [token_arguments(given, pair, "rms", "silu", bias=False)[1:] for pair in gates]

    def run(x):
        for _ in range(4):
            for down, arguments in zip(downs, rest, strict=True):
                h = op(1)(x, *arguments)
                x = torch.ops.ternc.linears1(
                    h, None, down.weight, down.scale, None, None, x, width, 0, 8, down.layout,
                    x.dtype,
                )  # fmt: skip
        return x

    run(given)
    run(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(given)
    for _ in range(20):
        given.copy_(torch.randn_like(given))
        with launch.alone():
            expected = run(given)
        assert torch.isfinite(expected.float()).all()
        assert torch.equal(run(given), expected)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
