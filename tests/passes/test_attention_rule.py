"""Attention of many tokens becomes ternc::attention; a mask that is constant is looked at."""

from __future__ import annotations

import pytest
import torch
from graphs import run_with, targets
from torch.nn import functional as F

from ternc import Config
from ternc.passes.context import Context
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
        apply(AttentionRule(), gm, Context(Config(), list(inputs), grad_enabled, False))

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
        attend(lambda tokens: torch.zeros(tokens, tokens).triu_(1)),
        attend(dropout_p=0.5),
    ],
)
def test_leaves_other_masks_and_dropout(function):
    assert not rewrite(function, *heads())[1]


def test_leaves_a_mask_that_is_an_input():
    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    assert not rewrite(run, *heads(), past(TOKENS))[1]


@pytest.mark.parametrize(
    ("arguments", "grad_enabled"),
    [(heads(32), False), (heads(dtype=torch.bfloat16), False), (heads(), True)],
)
def test_leaves_few_tokens_halves_and_training(arguments, grad_enabled):
    assert not rewrite(attend(is_causal=True), *arguments, grad_enabled=grad_enabled)[1]
