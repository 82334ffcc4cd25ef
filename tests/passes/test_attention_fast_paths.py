"""Fused attention nodes become projections and SDPA, and the float result stays what it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from graphs import Wrapper, run_with, targets
from torch import nn

from ternc.passes.attention_fast_paths import decompose_attention

FUSED = {
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}


def decompose(gm, inputs):
    assert decompose_attention(gm) == []


def check(module, *args, **kwargs):
    module = Wrapper(module)
    expected = module(*args, **kwargs)
    actual, graphs = run_with(module, decompose, *args, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6, equal_nan=True)
    names = [name for graph in graphs for name in targets(graph)]
    assert names and not FUSED.intersection(names)
    return names


MASKS = [None, "bool", "float", "heads"]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", [False, True])
def test_self_attention(mask, padding, need_weights):
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    masks = {
        "bool": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1),
        "float": torch.randn(5, 5),
        "heads": torch.randn(6, 5, 5),
    }
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 4] = True
    kwargs = {"need_weights": need_weights, "attn_mask": masks.get(mask)}
    if padding:  # torch wants both masks of one type
        floating = mask in ("float", "heads")
        kwargs["key_padding_mask"] = hidden.float() * -1e4 if floating else hidden
    with torch.no_grad():
        names = check(attention, x, x, x, **kwargs)
    assert names.count("linear") == 2  # one stacked input projection, one output projection


@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("add_bias_kv", "add_zero_attn", "bias"), v, strict=True))
        for v in itertools.product([False, True], repeat=3)
    ],
    ids=str,
)
def test_options(options):
    attention = nn.MultiheadAttention(16, 4, **options).eval()
    x, memory = torch.randn(5, 2, 16), torch.randn(7, 2, 16)
    with torch.no_grad():
        check(attention, x, memory, memory, average_attn_weights=False)
        check(attention, x, x, x, need_weights=False)
        check(attention, x, memory, torch.randn(7, 2, 16))


def test_separate_widths_and_unbatched():
    attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=12).eval()
    with torch.no_grad():
        names = check(attention, torch.randn(5, 2, 16), torch.randn(7, 2, 8), torch.randn(7, 2, 12))
        assert names.count("linear") == 4
        check(attention, torch.randn(5, 16), torch.randn(7, 8), torch.randn(7, 12))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", [None, "src", "padding"])
def test_encoder_layer(norm_first, activation, mask):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation
    ).eval()
    x = torch.randn(3, 5, 16)
    kwargs = {}
    if mask == "src":
        kwargs["src_mask"] = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    if mask == "padding":
        kwargs["src_key_padding_mask"] = torch.arange(5)[None] >= torch.tensor([5, 4, 3])[:, None]
    with torch.no_grad():
        names = check(layer, x, **kwargs)
    assert names.count("linear") == 4


def test_training_gradients():
    layer = Wrapper(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)).train()
    x = torch.randn(2, 5, 16)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    output, _ = run_with(layer, decompose, x)
    output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_static_keys_are_refused_with_a_reason():
    def attend(query, key, w, b, wo, bo):
        static = key.reshape(5, 4, 8).transpose(0, 1)
        return nn.functional.multi_head_attention_forward(
            query,
            key,
            key,
            16,
            2,
            w,
            b,
            None,
            None,
            False,
            0.0,
            wo,
            bo,
            training=False,
            static_k=static,
            static_v=static,
        )[0]

    reasons = []

    def edit(gm, inputs):
        reasons.extend(skip.reason for skip in decompose_attention(gm))

    args = [torch.randn(s) for s in ((5, 2, 16), (5, 2, 16), (48, 16), (48,), (16, 16), (16,))]
    actual, _ = run_with(attend, edit, *args)
    torch.testing.assert_close(actual, attend(*args))
    assert reasons and "static_k" in reasons[0]
