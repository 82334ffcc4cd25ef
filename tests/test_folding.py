"""Rotations folded offline: the float model stays the same function; what refuses, and why."""

from __future__ import annotations

import copy
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.config import Config
from ternc.folding import Folding, fold
from ternc.formats.rotation import Rotation
from ternc.formats.turn import HeadTurn, StreamTurn
from ternc.runtime import ops

ROTATED = Config(planes=3, rotation="hadamard", method="rtn")
WIDTH, TOKENS = 64, 96


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    ops.register()
    torch.manual_seed(0)


def unsettled(model):
    """Every vector of the model moved off its initial value: gains that are no ones."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" in name or "wpe" in name:
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def transformers_model(style, **more):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
    usual = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if style == "gpt2":
        gpt2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **sizes))
    if style == "bert":
        return transformers.BertModel(transformers.BertConfig(**usual, **sizes))
    config = transformers.LlamaConfig(**usual, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config)


def ids():
    return {"input_ids": torch.randint(3, TOKENS, (2, 7))}


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_the_whole_model_turns_and_stays_the_same_function(style):
    model = unsettled(transformers_model(style, tie_word_embeddings=False))
    inputs, before = ids(), copy.deepcopy(model)
    folding = fold(model, inputs, ROTATED)
    assert relative(outputs(model, inputs), outputs(before, inputs)) < 1e-5
    other = {"input_ids": torch.randint(3, TOKENS, (3, 11))}
    assert relative(outputs(model, other), outputs(before, other)) < 1e-5
    assert not folding.refused and folding.failed is None
    for name, note in folding.rotated.items():
        stream = not re.search(r"o_proj|attn.c_proj", name)
        assert ("residual stream (block 64, seed 0)" in note) == stream
        assert ("heads of 16 (block 16, seed 0)" in note) != stream
    gains = [p for n, p in model.named_parameters() if re.search(r"(norm|ln_\w)\.weight", n)]
    assert all((gain == 1).all() for gain in gains)
    assert set(dict(model.named_parameters())) == set(dict(before.named_parameters()))


def test_post_norm_folds_heads_alone():
    model = unsettled(transformers_model("bert"))
    inputs, before = ids(), copy.deepcopy(model)
    folding = fold(model, inputs, ROTATED)
    assert relative(outputs(model, inputs), outputs(before, inputs)) < 1e-5
    assert set(folding.rotated) == {f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)}
    reason = folding.refused["encoder.layer.1.attention.self.query"]
    assert "post-norm" in reason and "encoder.layer.1.attention.output.LayerNorm" in reason
    kept = [n for n, p in before.named_parameters() if not re.search(r"value|output\.dense", n)]
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], dict(before.named_parameters())[n]) for n in kept)


class Tiny(nn.Module):
    """Pre-norm language model with attention as people write it; `case` is what it does besides."""

    def __init__(self, case=""):
        super().__init__()
        self.case = case
        self.embed, self.places = nn.Embedding(TOKENS, 32), nn.Parameter(torch.randn(1, 9, 32))
        norm = nn.LayerNorm if case != "no gain" else lambda n: nn.LayerNorm(n, bias=False)
        self.norm1, self.norm2, self.norm3 = norm(32), norm(32), norm(32)
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, TOKENS, bias=False)
        if case == "tied":
            self.head.weight = self.embed.weight
        if case == "ternary":
            self.up.weight.data = torch.randint(-1, 2, (48, 32)).float()

    def attend(self, h):
        b, t, _ = h.shape
        q, k, v = self.qkv(h).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.case == "values squashed":
            v = torch.tanh(v)
        y = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
        if self.case == "values read":
            return self.o(y.transpose(1, 2).reshape(b, t, 32)) * v.mean()
        return self.o(y.transpose(1, 2).reshape(b, t, 32))

    def forward(self, x):
        x = 2.0 * self.embed(x) + self.places[:, : x.shape[1]]
        x = x + self.attend(self.norm1(x))
        if self.case == "clamped":
            x = x.clamp(-1, 1)
        h = self.norm2(x)
        if self.case == "norm read":
            h = h * h.sigmoid()
        x = x + self.down(F.gelu(self.up(h)))
        if self.case == "squared":
            x = x * x
        if self.case == "hidden state":
            return self.head(self.norm3(x)), x
        return self.head(self.norm3(x))


STREAM = {
    "tied": "embed.weight is used 2 times",
    "ternary": "up: its weight is ternary by value",
    "small gain": "norm3: its gain is too small",
    "clamped": "clamp",
    "norm read": "the norm in norm2 is read by sigmoid",
    "squared": "mul",
    "hidden state": "leaves the model",
}
UNSCALED = {"tied": {"head"}, "ternary": {"up"}, "small gain": {"head"}, "norm read": {"up"}}
"""Layers that do not take in the gain of their norm where the stream is refused."""
HEADS = {
    "values squashed": "changed between their projection and attention",
    "values read": "the values are also read by mean",
}


@pytest.mark.parametrize("case", ["", "no gain", *STREAM, *HEADS])
def test_what_folds_and_what_refuses(case):
    model = unsettled(Tiny(case))
    if case == "small gain":
        model.norm3.weight.data[3], model.norm3.bias.data[3] = 1e-6, 1.0
    x = torch.randint(0, TOKENS, (2, 7))
    with torch.no_grad():
        expected = model(x)
        folding = fold(model, (x,), ROTATED)
        actual = model(x)
    actual, expected = (y[0] if case == "hidden state" else y for y in (actual, expected))
    assert relative(actual, expected) < 1e-5
    assert folding.failed is None
    stream = {"qkv", "up", "head"}
    if case in STREAM:
        assert set(folding.rotated) == {"o"}
        assert STREAM[case] in folding.refused["qkv"]
        assert set(folding.scaled) == stream - UNSCALED.get(case, set())
    elif case in HEADS:
        assert set(folding.rotated) == stream and not folding.scaled
        assert HEADS[case] in folding.refused["o"]
    else:
        assert set(folding.rotated) == stream | {"o"}
        assert not folding.refused and not folding.scaled


def test_gains_move_to_the_layers_of_a_tied_model():
    model, x = unsettled(Tiny("tied")), torch.randint(0, TOKENS, (2, 7))
    q = ternc.quantize(model, ROTATED, example_inputs=(x,))
    assert (q.norm1.weight == 1).all() and (q.norm1.bias == 0).all()
    assert torch.equal(q.norm3.weight, model.norm3.weight) and q.head.weight is q.embed.weight
    reason = next(row.reason for row in ternc.report(q).rows if row.name == "up")
    assert "input rotated online" in reason and "gain of its norm folded" in reason
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.1


@pytest.mark.parametrize("view", [False, True])
def test_a_weight_that_something_uncalled_holds_too_is_left_alone(view):
    model = unsettled(Tiny())
    model.spare = nn.Parameter(model.o.weight.detach()) if view else model.o.weight
    x = torch.randint(0, TOKENS, (2, 7))
    weight = model.o.weight.clone()
    folding = fold(model, (x,), ROTATED)
    assert "spare and o.weight are one weight" in folding.refused["o"]
    assert torch.equal(model.o.weight, weight) and not folding.rotated


def test_one_token_shows_too_little():
    model = Tiny().eval()
    for shape, folds in (((3, 1), False), ((1, 2), True)):
        folding = fold(model, (torch.randint(0, TOKENS, shape),), ROTATED)
        assert bool(folding.rotated) == folds
    reasons = fold(Tiny().eval(), (torch.randint(0, TOKENS, (3, 1)),), ROTATED).refused
    assert all("one token" in reason for reason in reasons.values())


def test_a_break_in_the_graph_refuses():
    class Broken(Tiny):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Broken()

        def forward(self, x):
            y = self.inner.embed(x).sum()
            torch._dynamo.graph_break()
            return self.inner(x) + y

    folding = fold(Caller().eval(), (torch.randint(0, TOKENS, (2, 7)),), ROTATED)
    assert "graphs of the model" in folding.failed and not folding.rotated


def test_nothing_is_folded_unasked():
    model, x = Tiny().eval(), (torch.randint(0, TOKENS, (2, 7)),)
    for config in (Config(), Config(rotation="none")):
        assert fold(model, x, config) == Folding()


def test_turns_are_orthogonal():
    for turn in (
        StreamTurn(Rotation.of(48, 3)),
        StreamTurn(Rotation(1, 0)),
        HeadTurn(Rotation.of(4, 1), ((0, 2, 4, 6), (9, 8, 11, 10))),
    ):
        q = turn(torch.eye(48))
        torch.testing.assert_close(q @ q.t(), torch.eye(48))
    ones = torch.ones(48)
    torch.testing.assert_close(StreamTurn(Rotation.of(48, 3))(ones), ones)
    heads = HeadTurn(Rotation.of(4, 1), ((0, 2, 4, 6),))(torch.eye(48))
    assert torch.equal(heads[[1, 3, 5, 7]], torch.eye(48)[[1, 3, 5, 7]])


def test_quantize_folds_reports_saves_and_compiles_without_a_hadamard(tmp_path):
    model = unsettled(transformers_model("llama", tie_word_embeddings=False))
    inputs = ids()
    q = ternc.quantize(model, ROTATED, example_inputs=inputs)
    assert relative(outputs(q, inputs), outputs(model, inputs)) < 0.1
    rows = {row.name: row for row in ternc.report(q).rows}
    layer = "model.layers.1"
    assert "residual stream" in rows[f"{layer}.self_attn.q_proj"].reason
    assert f"with {layer}.self_attn.v_proj" in rows[f"{layer}.self_attn.o_proj"].reason
    assert "input rotated online" in rows[f"{layer}.mlp.down_proj"].reason
    assert rows["lm_head"].action == "skipped" and "residual stream" in rows["lm_head"].reason
    assert [n for n, m in q.named_modules() if getattr(m, "rotation", None)] == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    ternc.save(q, tmp_path)
    assert torch.equal(outputs(ternc.load(tmp_path), inputs), outputs(q, inputs))
    fast = torch.compile(q, backend="ternc", options={"inner": "eager"})
    assert relative(outputs(fast, inputs), outputs(q, inputs)) < 1e-3
    names = [node.target for node in ternc.report(fast).nodes]
    assert not any("hadamard" in name for name in names)
    assert sum("norm_quantize" in name for name in names) == 4
    assert sum("activate_quantize" in name for name in names) == 2


def test_calibration_knows_what_is_rotated_already():
    model, x = unsettled(Tiny()), torch.randint(0, TOKENS, (4, 7))
    batches = [(torch.randint(0, TOKENS, (4, 7)),) for _ in range(3)]
    config = Config(planes=2, rotation="hadamard", group_size=16)
    q = ternc.quantize(model, config, example_inputs=(x,), calibration=batches)
    rotated = {name for name, module in q.named_modules() if getattr(module, "rotation", None)}
    assert rotated == {"down"}
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.35


def test_without_example_inputs_the_reason_is_said():
    row = ternc.report(ternc.quantize(Tiny().eval(), ROTATED)).rows[0]
    assert "input rotated online: without example_inputs" in row.reason


def test_the_float_weights_are_let_go():
    model, x = Tiny().eval(), torch.randint(0, TOKENS, (2, 7))
    float_weight = weakref.ref(model.up.weight)
    ternc.quantize(model, ROTATED, example_inputs=(x,), inplace=True)
    assert float_weight() is None
