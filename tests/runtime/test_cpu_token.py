"""token_linears1..4 on the CPU: the numbers of the separate ops, bit for bit."""

from __future__ import annotations

import pytest
import torch
from reference import random_quantized, token_arguments

from ternc.errors import KernelError
from ternc.formats import pack
from ternc.runtime import cpu, dispatch, ops
from ternc.runtime.ops import token_linears

ops.register()
pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="no C++ library here")

SHAPES = [
    # rows, columns, planes, group_size
    (1, 1, 1, 0),
    (129, 300, 1, 0),
    (70, 127, 2, 8),
    (33, 64, 3, 0),
]


def op(count):
    return getattr(torch.ops.ternc, f"token_linears{count}")


def one_by_one(arguments):
    """The same by the ops that it joins."""
    x, gain, shift, kind, eps, offset, first, _, *lists, layouts = arguments
    q, sx = x, None
    if kind:
        norm = (gain, shift, kind, eps, offset, first, None, 0, 8, False)
        _, q, sx = torch.ops.ternc.norm_quantize(x, *norm)
    outputs = []
    for weight, scale, multiplier, bias, rows, group, layout in zip(*lists, layouts, strict=True):
        some = [t if t.numel() else None for t in (multiplier, bias)]
        held = (q, sx, weight, scale, *some, None, rows, group, 8, layout, x.dtype)
        outputs.append(torch.ops.ternc.linears1(*held))
    return outputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["", "rms", "layer"])
def test_products(shape, dtype, kind):
    weights = [pack(random_quantized(*shape), "cpu") for _ in range(4)]
    for tokens in ((1, 1), (2, 3), (0,)):
        x = torch.randn(*tokens, 2, shape[1], dtype=dtype).select(-2, 1)  # not contiguous
        for count in range(1, 5):
            arguments = token_arguments(x, weights[:count], kind, "", bias=count % 2 == 1)
            seen = op(count)(*arguments)
            seen = (seen,) if count == 1 else seen
            for y, exact in zip(seen, one_by_one(arguments), strict=True):
                assert y.dtype == dtype and torch.equal(y, exact)
    assert dispatch.last_kernel(weights[0].weight) == cpu.isa()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_activations_give_the_integers_of_the_separate_op(activation, dtype, count):
    weights = [pack(random_quantized(77, 127, 1, 8), "cpu") for _ in range(count)]
    for tokens in (1, 5):
        x = torch.randn(tokens, 127, dtype=dtype)
        arguments = token_arguments(x, weights, "rms", activation)
        h = op(1)(*arguments)
        gate, *up = one_by_one(arguments)
        up = up[0] if up else None
        q, sx = torch.ops.ternc.activate_quantize(gate, up, activation, None, 0, 8)
        seen_q, seen_sx = torch.ops.ternc.quantize_act(h, 8)
        assert torch.equal(seen_q, q) and torch.equal(seen_sx, sx)
        expected = token_linears.reference(*arguments)
        limit = 5e-3 if dtype == torch.float32 else 3e-2
        assert (h - expected).float().norm() <= limit * expected.float().norm()


def test_weights_that_cannot_be_activated_are_refused():
    wide, narrow = (pack(random_quantized(rows, 64, 1, 0), "cpu") for rows in (12, 8))
    x = torch.randn(1, 64)
    for weights, message in (([wide, narrow], "differ in rows"), ([wide] * 3, "entries")):
        arguments = token_arguments(x, weights, "rms", "silu")
        with pytest.raises(RuntimeError, match=message):
            op(1)(*arguments)
        with pytest.raises(KernelError, match="rows, not of one, or of two"):
            token_linears.reference(*arguments)
