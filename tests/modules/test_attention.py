"""TernaryMultiheadAttention against nn.MultiheadAttention, argument by argument."""

import itertools

import pytest
import torch
from torch import nn

from ternc.errors import InputError
from ternc.modules.attention import TernaryMultiheadAttention, split_projections

SHAPES = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "kdim vdim": {"kdim": 12, "vdim": 20},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 20},
}
T, S, B, E, H = 5, 7, 3, 16, 4


def make(batch_first=False, dropout=0.0, **shape):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, batch_first=batch_first, dropout=dropout, **shape)
    if theirs.in_proj_bias is not None:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours = TernaryMultiheadAttention.from_attention(theirs, split_projections(theirs))
    return theirs, ours.train(theirs.training)


def inputs(theirs, batched=True, batch_first=False):
    torch.manual_seed(1)
    widths = (E, theirs.kdim, theirs.vdim)
    tensors = [torch.randn(B, n, w) for n, w in zip((T, S, S), widths, strict=True)]
    if not batched:
        return [x[0] for x in tensors]
    return tensors if batch_first else [x.transpose(0, 1) for x in tensors]


def masks(kind, batched=True):
    """Keyword arguments: (attn_mask, key_padding_mask) of one kind; no row is hidden whole."""
    rows = B if batched else 1
    hidden = torch.rand(T, S) < 0.4
    hidden[:, 0] = False
    stacked = hidden.repeat(rows * H, 1, 1)
    padding = torch.zeros(rows, S, dtype=torch.bool)
    padding[0, S - 2 :] = True
    padding = padding if batched else padding[0]
    return {
        "none": {},
        "bool 2d": {"attn_mask": hidden},
        "bool 3d": {"attn_mask": stacked},
        "float 2d": {"attn_mask": torch.randn(T, S)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(padding.shape)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "both 3d": {"attn_mask": stacked, "key_padding_mask": padding},
    }[kind]


def assert_same(theirs, ours, args, **kwargs):
    expected, expected_weights = theirs(*args, **kwargs)
    seen, seen_weights = ours(*args, **kwargs)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert (seen_weights is None) == (expected_weights is None)
    if seen_weights is not None:
        torch.testing.assert_close(seen_weights, expected_weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", ["batch first", "batch second", "unbatched"])
def test_equals_float_attention(shape, batched):
    batch_first = batched == "batch first"
    theirs, ours = make(batch_first, **SHAPES[shape])
    args = inputs(theirs, batched != "unbatched", batch_first)
    kinds = (
        "none",
        "bool 2d",
        "bool 3d",
        "float 2d",
        "padding",
        "float padding",
        "both",
        "both 3d",
    )
    choices = itertools.product(kinds, (True, False), (True, False), ("train", "eval"))
    for kind, need_weights, average, mode in choices:
        getattr(theirs, mode)(), getattr(ours, mode)()
        assert_same(
            theirs,
            ours,
            args,
            need_weights=need_weights,
            average_attn_weights=average,
            **masks(kind, batched != "unbatched"),
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint(shape, need_weights, padded):
    theirs, ours = make(True, **SHAPES[shape])
    args = inputs(theirs, True, True)
    mask = nn.Transformer.generate_square_subsequent_mask(S)[:T]
    extra = masks("padding") if padded else {}
    if padded:  # both masks of one type, as torch asks
        extra = {"key_padding_mask": torch.zeros(B, S).masked_fill(extra["key_padding_mask"], -9.0)}
    assert_same(
        theirs, ours, args, attn_mask=mask, is_causal=True, need_weights=need_weights, **extra
    )


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights):
    theirs, ours = make(True, dropout=0.5)
    args = inputs(theirs, True, True)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(module(*args, need_weights=need_weights)[0])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.manual_seed(8)
    assert not torch.allclose(ours(*args, need_weights=need_weights)[0], results[0])
    ours.eval()
    assert torch.equal(ours(*args)[0], ours(*args)[0])


def test_gradients_equal():
    theirs, ours = make(True, add_bias_kv=True)
    grads = []
    for module in (theirs, ours):
        args = [x.requires_grad_() for x in inputs(theirs, True, True)]
        module(*args, need_weights=False)[0].square().sum().backward()
        grads.append([x.grad for x in args])
    for seen, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


def test_self_attention_projects_one_tensor():
    """Three views of one input stay one tensor: what lets the projections be fused."""
    theirs, ours = make(batch_first=False)
    seen = []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(ours, name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(T, B, E)
    assert_same(theirs, ours, (x, x, x))
    assert seen[0] is seen[1] is seen[2]


def test_loads_keys_of_float_attention():
    for shape in SHAPES.values():
        theirs, ours = make(True, **shape)
        for parameter in ours.parameters():
            nn.init.zeros_(parameter)
        result = ours.load_state_dict(theirs.state_dict())
        assert not result.missing_keys
        args = inputs(theirs, True, True)
        assert_same(theirs, ours, args)


def test_stacked_weight_of_another_shape_is_reported():
    theirs, ours = make()
    state = theirs.state_dict()
    state["in_proj_weight"] = torch.zeros(3 * E + 1, E)
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        ours.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "attn_mask"),
        ({"attn_mask": torch.zeros(T, S + 1)}, "attn_mask"),
        ({"attn_mask": torch.zeros(T, S, dtype=torch.int64)}, "bool and floating"),
        ({"key_padding_mask": torch.zeros(B + 1, S)}, "key_padding_mask"),
        ({"query": torch.zeros(T, E)}, "dimensions"),
        ({"value": torch.zeros(B, S + 1, E)}, "do not fit"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    theirs, ours = make(True)
    arguments = dict(zip(("query", "key", "value"), inputs(theirs, True, True), strict=True))
    with pytest.raises(InputError, match=message):
        ours(**{**arguments, **change})


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_equals_the_fused_path(need_weights):
    """In eval mode without gradients torch runs one fused kernel; the numbers are the same."""
    theirs, ours = make(True)
    theirs.eval(), ours.eval()
    x = torch.randn(B, S, E)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, S - 2 :] = True
    with torch.no_grad():
        for mask in (None, padding):
            arguments = {"key_padding_mask": mask, "need_weights": need_weights}
            assert_same(theirs, ours, (x, x, x), **arguments)


def test_empty_batch_and_half_precision():
    _, ours = make(True)
    empty = torch.zeros(0, S, E)
    output, weights = ours(empty, empty, empty)
    assert output.shape == (0, S, E) and weights.shape == (0, S, S)
    x = torch.randn(B, S, E).bfloat16()
    mask = torch.zeros(S, S, dtype=torch.bool).fill_diagonal_(True)
    output, weights = ours.bfloat16()(x, x, x, attn_mask=mask)
    assert output.dtype == weights.dtype == torch.bfloat16


def test_is_traced_without_a_break_for_any_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make(True)[1]

        def forward(self, x, padding):
            return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    model = Model().eval()
    torch._dynamo.reset()
    frames = []

    def record(gm, _):
        frames.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=record, fullgraph=True, dynamic=True)
    for batch, length in ((2, 5), (3, 7), (4, 6)):
        x, padding = torch.randn(batch, length, E), torch.zeros(batch, length, dtype=torch.bool)
        torch.testing.assert_close(compiled(x, padding), model(x, padding))
    assert len(frames) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refuses_nested_tensors():
    _, ours = make(True)
    x = torch.nested.nested_tensor([torch.zeros(T, E), torch.zeros(S, E)])
    with pytest.raises(InputError, match="nested"):
        ours(x, x, x)
