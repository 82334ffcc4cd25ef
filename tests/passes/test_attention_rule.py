"""Attention of many tokens becomes ternc::attention; a mask that is constant is looked at."""

from __future__ import annotations

import pytest
import torch
from graphs import run_with, targets
from torch.nn import functional as F

from ternc import Config
from ternc.passes.context import Context
from ternc.passes.mutation import tainted
from ternc.passes.pipeline import apply
from ternc.passes.rules.attention import AttentionRule
from ternc.runtime import ops

ops.register()
TOKENS = 80


def heads(tokens=TOKENS, dtype=torch.float32):
    q = torch.randn(2, 4, tokens, 16, dtype=dtype)
    return q, *(torch.randn(2, 2, tokens, 16, dtype=dtype) for _ in range(2))


def rewrite(function, *args, grad_enabled=False):
    """Output of the rewritten function, and whether attention is the op."""

    def edit(gm, inputs):
        context = Context(Config(), list(inputs), grad_enabled, False, tainted=tainted(gm))
        apply(AttentionRule(), gm, context)

    output, (gm,) = run_with(function, edit, *args)
    return output, "attention.default" in targets(gm)


def attend(mask=None, **options):
    """q, k, v -> attention with what `mask` makes of the number of tokens."""

    def run(q, k, v):
        made = mask(q.shape[2]) if mask else None
        return F.scaled_dot_product_attention(q, k, v, made, enable_gqa=True, **options)

    return run


def past(tokens):
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (columns <= rows) & rows.new_ones((), dtype=torch.bool)


def past_and_more(tokens):
    mask = past(tokens)
    mask[0] = True
    return mask


@torch.compiler.allow_in_graph
def past_today(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def hides_with(value):
    return lambda tokens: torch.full((tokens, tokens), value).triu(1)


@pytest.mark.parametrize(
    "function",
    [
        attend(),
        attend(is_causal=True),
        attend(is_causal=True, scale=0.3),
        attend(past),
        attend(lambda tokens: past(tokens).expand(2, 1, tokens, tokens)),
        attend(hides_with(float("-inf"))),
        attend(hides_with(torch.finfo(torch.float32).min), scale=0.1),
    ],
)
def test_replaces_attention_with_no_mask_or_the_causal_one(function):
    q, k, v = heads()
    seen, replaced = rewrite(function, q, k, v)
    assert replaced
    torch.testing.assert_close(seen, function(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        attend(lambda tokens: past(tokens).logical_not() | past(tokens).mT),
        attend(lambda tokens: past(tokens) & (torch.arange(tokens) > 0)),
        attend(hides_with(-1e4)),
        attend(lambda tokens: torch.rand(tokens, tokens)),
        attend(past_and_more),
        attend(past_today),
        attend(lambda tokens: torch.zeros(1, 1, 1, 1)),
        attend(lambda tokens: torch.ones(tokens, 1, dtype=torch.bool)),
        attend(lambda tokens: torch.arange(tokens)[None] == 0),
        attend(dropout_p=0.5),
    ],
)
def test_leaves_other_masks_and_dropout(function):
    assert not rewrite(function, *heads())[1]


@pytest.mark.parametrize("sizes", [(1, 4, TOKENS, 16), (2, 1, TOKENS, 16), (2, 4, TOKENS, 0)])
def test_leaves_values_that_are_broadcast_and_empty_ones(sizes):
    q, k, v = torch.randn(2, 4, TOKENS, 16), torch.randn(2, 4, TOKENS, 16), torch.randn(sizes)
    seen, replaced = rewrite(F.scaled_dot_product_attention, q, k, v)
    assert not replaced
    assert seen.shape == (2, 4, TOKENS, sizes[3])


def test_leaves_a_mask_that_is_an_input():
    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    assert not rewrite(run, *heads(), past(TOKENS))[1]


def few(queries, keys=50):
    _, k, v = heads(keys)
    return torch.randn(2, 4, queries, 16), k, v


MASKS = [
    torch.arange(50)[None] < 31,
    (torch.arange(50) % 3 > 0)[None, None, None],
    torch.rand(2, 1, 3, 50) < 0.5,
]


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_replaces_attention_of_few_queries_with_any_mask_that_shows_keys(mask):
    q, k, v = few(3)

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    seen, replaced = rewrite(run, q, k, v, mask)
    assert replaced
    torch.testing.assert_close(seen, run(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_leaves_masks_that_are_added_and_counts_between():
    q, k, v = few(1)
    assert not rewrite(attend(lambda tokens: torch.zeros(tokens, 50)), q, k, v)[1]
    assert not rewrite(attend(), *few(5))[1]


def repeated(x, times=2):
    batch, groups, keys, columns = x.shape
    spread = x[:, :, None, :, :].expand(batch, groups, times, keys, columns)
    return spread.reshape(batch, groups * times, keys, columns)


def repeated_attention(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v))


def repeated_before_a_write(q, k, v):
    keys, values = repeated(k), repeated(v)
    k.mul_(2.0)
    return F.scaled_dot_product_attention(q, keys, values)


def repeated_behind_a_write(q, k, v):
    k.mul_(2.0)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v))


def repeated_out_of_order(q, k, v):
    return F.scaled_dot_product_attention(q, repeated(k[:, [1, 0]]), repeated(v))


@pytest.mark.parametrize(
    ("function", "bare"),
    [
        (repeated_attention, True),
        (repeated_behind_a_write, True),
        (repeated_before_a_write, False),
        (repeated_out_of_order, True),
    ],
)
@pytest.mark.parametrize("queries", [1, TOKENS])
def test_reads_repeated_keys_where_they_are(function, bare, queries):
    q, k, v = few(queries, 70)
    found = []

    def edit(gm, inputs):
        apply(AttentionRule(), gm, Context(Config(), list(inputs), False, False))
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.ternc.attention.default)
        found.append(node.args[1].meta["example_value"].shape[1] == 2)

    wanted = function(q, k.clone(), v)
    seen, _ = run_with(function, edit, q, k.clone(), v)
    assert found == [bare]
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "grad_enabled"),
    [(heads(32), False), (heads(dtype=torch.bfloat16), False), (heads(), True)],
)
def test_leaves_few_tokens_halves_and_training(arguments, grad_enabled):
    assert not rewrite(attend(is_causal=True), *arguments, grad_enabled=grad_enabled)[1]
