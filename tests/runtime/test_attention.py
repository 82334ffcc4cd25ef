"""ternc::attention: every instruction set against attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ternc.errors import KernelError
from ternc.runtime.ops import attention

pytestmark = pytest.mark.usefixtures("every_isa")

SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 70, 70, 24, 40),
    (1, 3, 3, 65, 130, 16, 16),
    (2, 2, 1, 33, 300, 8, 5),
    (1, 2, 2, 100, 40, 64, 64),
    (1, 2, 2, 0, 40, 4, 4),
    (1, 12, 12, 1, 256, 64, 64),
    (2, 6, 2, 1, 37, 80, 72),
    (2, 6, 3, 3, 5, 17, 131),
]
"""B, H, G, L, S, D, Dv."""
CAUSAL = pytest.mark.parametrize("causal", [False, True])


def heads(shape):
    batch, query_heads, key_heads, queries, keys, columns, value_columns = shape
    q = torch.randn(batch, query_heads, queries, columns)
    k = torch.randn(batch, key_heads, keys, columns)
    return q, k, torch.randn(batch, key_heads, keys, value_columns)


def exact(q, k, v, scale, causal, mask=None):
    q, k, v = (t.double() for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@CAUSAL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, causal):
    q, k, v = heads(shape)
    y = torch.ops.ternc.attention(q, k, v, 0.3, causal)
    torch.testing.assert_close(
        y.double(), exact(q, k, v, 0.3, causal), rtol=1e-5, atol=1e-5, check_stride=False
    )
    assert y.dtype == torch.float32
    assert y.transpose(1, 2).is_contiguous()


MASKS = {
    "a prefix": lambda sizes: torch.arange(sizes[3])[None] < 30,
    "a window": lambda sizes: (torch.arange(sizes[3])[None] - 17).abs() < 9,
    "a row a query": lambda sizes: torch.rand(sizes[0], 1, *sizes[2:]) < 0.5,
    "a row a head": lambda sizes: torch.rand(sizes[1], 1, sizes[3]) < 0.5,
    "strided": lambda sizes: (torch.rand(sizes[3], *sizes[:3]) < 0.5).movedim(0, 3),
    "a column": lambda sizes: torch.arange(sizes[2])[:, None] % 2 == 0,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_agrees_with_float64_under_a_mask(mask, queries):
    q, k, v = heads((2, 6, 2, queries, 41, 20, 36))
    mask = mask((2, 6, queries, 41))
    y = torch.ops.ternc.attention(q, k, v, 0.3, False, mask)
    wanted = exact(q, k, v, 0.3, False, mask).nan_to_num(0.0)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5, check_stride=False)
    torch.testing.assert_close(attention.reference(q, k, v, 0.3, False, mask), y)


def test_hidden_keys_are_not_read():
    q, k, v = heads((1, 4, 2, 1, 100, 16, 16))
    mask = torch.arange(100) % 3 == 0
    y = torch.ops.ternc.attention(q, k, v, 0.3, False, mask[None])
    k[:, :, ~mask], v[:, :, ~mask] = float("nan"), float("inf")
    assert torch.equal(torch.ops.ternc.attention(q, k, v, 0.3, False, mask[None]), y)


def test_causal_and_masked_are_both():
    q, k, v = heads((1, 2, 2, 3, 8, 4, 4))
    mask = torch.tensor([[False, True, True, True, True, False, True, True]])
    both = mask & torch.ones(3, 8, dtype=torch.bool).tril()
    y = torch.ops.ternc.attention(q, k, v, 0.3, True, mask)
    assert torch.equal(y, torch.ops.ternc.attention(q, k, v, 0.3, False, both))
    torch.testing.assert_close(attention.reference(q, k, v, 0.3, True, mask), y)


def test_reads_tensors_of_any_strides():
    q, k, v = (torch.randn(2, 40, 3, 8).transpose(1, 2) for _ in range(3))
    y = torch.ops.ternc.attention(q, k, v, 0.3, True)
    assert torch.equal(
        y, torch.ops.ternc.attention(*(t.contiguous() for t in (q, k, v)), 0.3, True)
    )


def test_large_scores_neither_overflow_nor_reach_hidden_keys():
    q, k, v = heads((1, 1, 1, 80, 80, 16, 4))
    k[:, :, 40:] *= 1e4
    y = torch.ops.ternc.attention(q, k, v, 1.0, True)
    torch.testing.assert_close(y.double(), exact(q, k, v, 1.0, True), rtol=1e-3, atol=1e-3)
    v[:, :, 70:] = 1e30
    assert torch.equal(torch.ops.ternc.attention(q, k, v, 1.0, True)[:, :, :70], y[:, :, :70])


@pytest.mark.parametrize("count", [300, 600], ids=["a span", "all"])
def test_scores_of_minus_infinity_count_as_nothing(count):
    q, k, v = heads((1, 1, 1, 40, 600, 4, 3))
    q[..., 0], k[..., 0] = 1e20, 1e-20
    k[:, :, :count, 0] = -1e20
    y = torch.ops.ternc.attention(q, k, v, 1.0, False)
    wanted = torch.zeros_like(y)
    if count < 600:
        wanted = exact(q, k[:, :, count:], v[:, :, count:], 1.0, False).float()
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.reference(q, k, v, 1.0, False), y, rtol=1e-5, atol=1e-5)


def test_a_query_that_is_nan_spoils_its_own_row_alone():
    q, k, v = heads((1, 2, 2, 50, 50, 8, 8))
    clean = torch.ops.ternc.attention(q, k, v, 0.3, True)
    q[0, 1, 7, 3] = float("nan")
    seen = torch.ops.ternc.attention(q, k, v, 0.3, True)
    assert seen[0, 1, 7].isnan().all()
    seen[0, 1, 7] = clean[0, 1, 7]
    assert torch.equal(seen, clean)


def test_threads_change_nothing():
    q, k, v = heads((1, 3, 3, 200, 200, 16, 16))
    one = torch.ops.ternc.attention(q, k, v, 0.3, True)
    torch.set_num_threads(3)
    assert torch.equal(torch.ops.ternc.attention(q, k, v, 0.3, True), one)
    torch.set_num_threads(1)


@CAUSAL
def test_gradients_are_those_of_the_definition(causal):
    tensors = [t.requires_grad_() for t in heads((2, 4, 2, 9, 12, 8, 6))]
    along = torch.randn(2, 4, 9, 6)
    mask = None if causal else torch.rand(2, 4, 9, 12) < 0.7
    y = torch.ops.ternc.attention(*tensors, 0.3, causal, mask)
    seen = torch.autograd.grad(y, tensors, along)
    wanted = torch.autograd.grad(exact(*tensors, 0.3, causal, mask), tensors, along.double())
    torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-5)


def test_the_fake_has_the_shape_and_the_strides():
    tensors = heads((2, 4, 2, 9, 12, 8, 6))
    torch.library.opcheck(
        torch.ops.ternc.attention.default, (*tensors, 0.3, True), test_utils=["test_faketensor"]
    )


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 2, 4, 8), (1, 2, 4, 7), "do not fit"),
        ((1, 3, 4, 8), (1, 2, 4, 8), "do not fit"),
        ((1, 2, 4, 8), (1, 2, 0, 8), "do not fit"),
        ((2, 4, 8), (2, 4, 8), "not float32"),
    ],
)
def test_refuses_what_does_not_fit(q, k, message):
    q, k = torch.randn(q), torch.randn(k)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternc.attention(q, k, k, 0.3, True)
    with pytest.raises(KernelError, match=message):
        attention.reference(q, k, k, 0.3, True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 5), "not bool"),
        (torch.ones(1, 1, 1, 1, 5, dtype=torch.bool), "not bool"),
        (torch.ones(4, 4, dtype=torch.bool), "mask does not fit"),
    ],
)
def test_refuses_a_mask_that_does_not_fit(mask, message):
    q, k, v = heads((1, 2, 2, 4, 5, 8, 8))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternc.attention(q, k, v, 0.3, False, mask)
    with pytest.raises(KernelError, match=message):
        attention.reference(q, k, v, 0.3, False, mask)
