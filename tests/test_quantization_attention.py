"""Attention under quantize: every projection is packed and none is bypassed."""

import pytest
import torch
from quantization_cases import Net, rows_of
from torch import nn

from ternc.config import Config
from ternc.modules.attention import TernaryMultiheadAttention
from ternc.modules.linear import TernaryLinear
from ternc.quantization import quantize

MODES = {
    "train": (nn.Module.train, torch.enable_grad),
    "eval": (nn.Module.eval, torch.enable_grad),
    "no_grad": (nn.Module.eval, torch.no_grad),
    "inference_mode": (nn.Module.eval, torch.inference_mode),
}


PARTS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}


def wrap_counters(model):
    """Counters without hooks: torch leaves its fast path when it sees a hook."""
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            calls[name] = 0

            def counting(x, name=name, forward=module.forward):
                calls[name] += 1
                return forward(x)

            module.forward = counting
    return calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "exclude", [(), ("*.self_attn",), ("*.linear?",), ("*.q_proj", "*.linear1")], ids=str
)
def test_no_layer_of_an_encoder_is_bypassed(mode, padded, exclude):
    """Seeds, acceptance 2."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    q = quantize(model, Config(exclude=exclude, activation_bits=None))
    assert type(q.layers[0]) is nn.TransformerEncoderLayer
    calls = wrap_counters(q)
    assert calls
    set_mode, grad_mode = MODES[mode]
    set_mode(q), set_mode(model)
    x = torch.randn(3, 6, 32)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padded
    arguments = {"src_key_padding_mask": padding} if padded else {}
    with grad_mode():
        y = q(x, **arguments)
    assert calls == dict.fromkeys(calls, 1)
    with torch.enable_grad():  # the float model off its fast path too
        expected = model.train()(x, **arguments)
    visible = ~padding
    assert (y - expected)[visible].norm() < 0.15 * expected[visible].norm()


@pytest.mark.parametrize("mode", MODES)
def test_no_layer_of_a_decoder_is_bypassed(mode):
    model = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    q = quantize(model)
    calls = wrap_counters(q)
    assert len(calls) == 10
    set_mode, grad_mode = MODES[mode]
    set_mode(q)
    with grad_mode():
        q(torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    assert calls == dict.fromkeys(calls, 1)


@pytest.mark.parametrize("mode", MODES)
def test_no_projection_of_attention_is_bypassed(mode):
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    q = quantize(model)
    assert isinstance(q, TernaryMultiheadAttention)
    calls = wrap_counters(q)
    set_mode, grad_mode = MODES[mode]
    set_mode(q)
    x = torch.randn(2, 5, 32)
    for need_weights in (True, False):
        with grad_mode():
            q(x, x, x, need_weights=need_weights)
    assert calls == dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), 2)


def test_attention_rows_and_bytes():
    q = quantize(Net(self_attn=nn.MultiheadAttention(32, 4)))
    rows = rows_of(q)
    assert set(rows) == PARTS
    assert rows["self_attn.k_proj"].pattern == "multihead_attention.k_proj"
    assert all(row.bytes_before == 4 * 32 * 32 for row in rows.values())


def test_attention_that_is_excluded_stays_whole():
    model = Net(self_attn=nn.MultiheadAttention(32, 4))
    q = quantize(model, Config(exclude=("self_attn",)))
    assert type(q.self_attn) is nn.MultiheadAttention
    assert type(q.self_attn.out_proj) is type(model.self_attn.out_proj)


def test_a_projection_left_in_float_holds_no_more_than_itself():
    q = quantize(nn.MultiheadAttention(32, 4), Config(exclude=("k_proj",)))
    assert type(q.k_proj) is nn.Linear and isinstance(q.q_proj, TernaryLinear)
    assert q.k_proj.weight.untyped_storage().nbytes() == 4 * 32 * 32
    assert q.k_proj.weight.requires_grad


def test_attention_loads_a_float_state_dict():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    other = quantize(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(other(x), quantize(model.eval())(x))


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_an_attention_subclass_with_its_own_forward_is_left():
    q = quantize(Net(attn=OwnAttention(16, 2)))
    assert type(q.attn) is OwnAttention and "overrides forward" in rows_of(q)["attn"].reason
