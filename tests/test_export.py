"""`ternc export`: each target's file is read back by the program it is for, or by its package."""

import json
import os

import pytest
import torch

import ternc
from ternc.cli import main
from ternc.config import INT8
from ternc.errors import InputError, UnsupportedModelError, WeightShapeError
from ternc.export import export, gguf_tokenizer, load_program
from ternc.export.blocks import blocks_of, to_bytes
from ternc.formats.packed import unpack
from ternc.formats.quantized import Quantized

transformers = pytest.importorskip("transformers")
os.environ["HF_HUB_OFFLINE"] = "1"

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ONE_SCALE = ternc.Config(planes=1, group_size="tensor")


def decoder(kind="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that matter
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    return model


def packed(*args, **config):
    config = {"planes": 1, "group_size": None, "activation_bits": None, **config}
    return ternc.quantize(decoder(*args), ternc.Config(**config))


@pytest.fixture
def ids():
    return torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_program_gives_the_logits_at_every_length(tmp_path, ids):
    model = packed(planes=2, rotation="hadamard", int8=("*embed_tokens",), activation_bits=8)
    path = tmp_path / "model.pt2"
    found = export(model, "pt2", path, inputs={"input_ids": ids})
    assert found["bytes"] == path.stat().st_size
    program = load_program(path)
    assert torch.equal(program(input_ids=ids), logits(model, ids))
    longer = torch.cat((ids, ids, ids), 1)[:1]
    assert torch.equal(program(input_ids=longer), logits(model, longer))
    rows, columns = found["inputs"]["input_ids"]
    assert not rows.isdigit() and not columns.isdigit()
    held = [*program.named_parameters(), *program.named_buffers()]
    matrices = [n for n, t in held if t.is_floating_point() and t.dim() == 2]
    assert len(matrices) == 1 and "lm_head" in matrices[0]  # the rest is packed


def test_program_that_cannot_be_traced(tmp_path):
    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    model = ternc.quantize(Loop(), ternc.Config(planes=1))
    with pytest.raises(UnsupportedModelError, match=r"Loop: torch\.export cannot trace it"):
        export(model, "pt2", tmp_path / "loop.pt2", inputs={"x": torch.ones(2, 8)})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_bitnet_folder(tmp_path, ids, bias, dtype):
    """Logits of its own layers, and the same trits when ternc reads them back."""
    pytest.importorskip("accelerate")
    model = decoder("Llama", attention_bias=bias, tie_word_embeddings=not bias).to(dtype)
    model = ternc.quantize(model, ONE_SCALE)
    found = export(model, "bitnet", tmp_path)
    assert found["linear_class"] == ("bitlinear" if bias else "autobitlinear")
    with torch._dynamo.config.patch(disable=True):  # transformers compiles parts of its layers
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
        theirs = logits(loaded, ids)
    ours = logits(model.float() if loaded.dtype == torch.float32 else model, ids)
    # An activation on the edge between two integers takes either: 2e-4 seen, else 1e-7.
    assert (theirs - ours).norm() < 1e-3 * ours.norm()
    layer = model.model.layers[0].mlp.down_proj
    there = loaded.model.layers[0].mlp.down_proj
    if bias:
        assert there.weight.dtype == torch.uint8
    else:
        assert torch.equal(there.weight.float() * there.weight_scale, layer.weight.float())


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"planes": 2}, WeightShapeError, "q_proj.weight is ternary x2 row, .* planes=1"),
        ({"planes": 1, "group_size": 32}, WeightShapeError, "group_size='tensor'"),
        ({"int8": ("*embed_tokens",)}, UnsupportedModelError, "embed_tokens is an embedding"),
        ({"rotation": "hadamard"}, UnsupportedModelError, "rotation='none'"),
    ],
)
def test_what_bitnet_does_not_hold(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        export(packed(**{"group_size": None, **config}), "bitnet", tmp_path)


def quantized(planes, multiplied, rows=6, columns=512, generator=None):
    generator = torch.Generator().manual_seed(planes + 10 * multiplied)
    most = {1: 1, 2: 4, 3: 13, INT8: 127}[planes]
    codes = torch.randint(-most, most + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = (torch.rand(rows, generator=generator) * 1e-2 + 1e-3).half().float()
    shape = (rows, columns // 128)
    many = torch.randint(1, 127 // most + 1, shape, generator=generator).to(torch.uint8)
    grouped = multiplied and planes != INT8
    return Quantized(codes, scale, many if grouped else None, 128 if grouped else 0, planes)


@pytest.mark.parametrize("planes, multiplied, trits, rounds, kind", [
    (1, False, "TQ2_0", False, "TQ2_0"),
    (1, False, "TQ1_0", False, "TQ1_0"),
    (1, True, "TQ2_0", False, "Q8_0"),
    (1, True, "TQ2_0", True, "Q4_0"),
    (2, False, "TQ2_0", False, "Q4_0"),
    (3, False, "TQ2_0", False, "Q5_0"),
    (3, True, "TQ2_0", False, "Q8_0"),
    (3, True, "TQ2_0", True, "Q5_0"),
    (INT8, False, "TQ2_0", False, "Q8_0"),
])  # fmt: skip
def test_blocks_hold_the_values(planes, multiplied, trits, rounds, kind):
    gguf = pytest.importorskip("gguf")
    weight = quantized(planes, multiplied)
    blocks = blocks_of(weight, trits, rounds)
    assert blocks.type.name == kind and blocks.exact == (not rounds)
    raw = gguf.GGMLQuantizationType[kind]
    read = torch.from_numpy(gguf.quants.dequantize(to_bytes(blocks), raw))
    expected = weight.dequantize()
    if rounds:
        assert ((read - expected).abs() <= 2.0**-11 * expected.abs()).all()
    else:
        assert torch.equal(read, expected)


def test_no_block_holds_these():
    odd = quantized(1, False, columns=48)
    assert blocks_of(odd, "TQ2_0", True) is None
    weight = quantized(3, False)
    small = Quantized(weight.codes, weight.scale * 1e-6, None, 0, 3)  # no normal fp16 numbers
    assert blocks_of(small, "TQ2_0", True) is None


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_gguf_file_holds_every_weight(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    model, path = packed(kind, planes=3, group_size=32), tmp_path / "model.gguf"
    found = export(model, "gguf", path)
    assert found["tensors"]["Q8_0"] == 7 and found["rounded_scales"] == 0
    read = gguf.GGUFReader(path)
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in read.tensors
    }
    assert len(tensors) == sum(found["tensors"].values())
    layer = model.model.layers[0]
    assert torch.equal(tensors["blk.0.ffn_down.weight"], layer.mlp.down_proj.weight)
    query = layer.self_attn.q_proj.weight
    if kind == "Llama":  # from halves of a head to pairs
        head = query.shape[0] // 4
        query = query.view(4, 2, head // 2, -1).transpose(1, 2).reshape(query.shape)
    assert torch.equal(tensors["blk.0.attn_q.weight"], query)
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert int(read.fields[f"{found['architecture']}.attention.head_count_kv"].contents()) == 2


def tokenizer(pattern=None, prefix=False):
    tokenizers = pytest.importorskip("tokenizers")
    cut = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = cut.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    if pattern is not None:
        split = cut.Split(tokenizers.Regex(pattern), "isolated")
        made.pre_tokenizer = cut.Sequence([split, made.pre_tokenizer])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<begin>", "<end>"], show_progress=False
    )
    made.train_from_iterator(["one and two and three and many more of them"], trainer)
    names = {"bos_token": "<begin>", "eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("entry", json.loads(gguf_tokenizer.TABLE.read_text(encoding="utf-8")))
def test_gguf_file_holds_the_tokenizer(tmp_path, entry):
    gguf = pytest.importorskip("gguf")
    made, path = tokenizer(entry["split"]), tmp_path / "model.gguf"
    export(packed(), "gguf", path, tokenizer=made)
    fields = gguf.GGUFReader(path).fields
    read = {name.removeprefix("tokenizer.ggml."): f.contents() for name, f in fields.items()}
    assert (read["model"], read["pre"]) == ("gpt2", entry["name"])
    ids = made.get_vocab()
    assert {name: read["tokens"].index(name) for name in ids} == ids
    assert len(read["tokens"]) == 96 and read["token_type"].count(5) == 96 - len(ids)
    assert read["token_type"][:3] == [3, 3, 1]
    known = [m if isinstance(m, str) else " ".join(m) for m in gguf_merges(made)]
    assert read["merges"] == known != []
    assert (read["bos_token_id"], read["eos_token_id"], read["add_bos_token"]) == (0, 1, False)


def gguf_merges(made):
    return json.loads(made.backend_tokenizer.to_str())["model"]["merges"]


def test_tokenizers_that_gguf_does_not_hold(tmp_path):
    pytest.importorskip("gguf")
    for made, message in (
        (tokenizer(prefix=True), "cuts text by .*--no-tokenizer"),
        (tokenizer(pattern=r"\w+"), "cuts text by"),
        (object(), "object: its tokens are 'of no known kind'"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            export(packed(), "gguf", tmp_path / "model.gguf", tokenizer=made)
    small = ternc.quantize(decoder(vocab_size=32), ternc.Config(planes=1))
    with pytest.raises(UnsupportedModelError, match="the model's embedding 32 rows"):
        export(small, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: packed("Llama", rotation="hadamard"), UnsupportedModelError, "rotation='none'"),
        (
            lambda: ternc.quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), ONE_SCALE),
            UnsupportedModelError,
            r"Sequential \(model_type None\) has no known form in llama.cpp; known .* llama",
        ),
        (
            lambda: ternc.quantize(decoder(hidden_act="gelu"), ternc.Config(planes=1)),
            UnsupportedModelError,
            "hidden_act",
        ),
        (
            lambda: ternc.quantize(decoder(intermediate_size=80), ternc.Config(planes=1)),
            WeightShapeError,
            "80 columns: .* multiple of 32",
        ),
        (decoder, InputError, "no packed layer"),
    ],
)
def test_what_gguf_does_not_hold(tmp_path, make, error, message):
    pytest.importorskip("gguf")
    with pytest.raises(error, match=message):
        export(make(), "gguf", tmp_path / "model.gguf")


def test_command(tmp_path, ids, capsys):
    model = ternc.quantize(decoder(), ONE_SCALE)
    ternc.save(model, tmp_path / "packed")
    out = str(tmp_path / "model.pt2")
    assert main(["export", str(tmp_path / "packed"), "--to", "pt2", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["input_ids"]
    assert (tmp_path / "model.pt2").is_file()
    folder = str(tmp_path / "bitnet")
    assert main(["export", str(tmp_path / "packed"), "--to", "bitnet", "-o", folder]) == 0
    written = json.loads((tmp_path / "bitnet" / "config.json").read_text())
    assert written["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    wrong = ["export", str(tmp_path / "packed"), "--to", "pt2", "-o", out, "--round-scales"]
    assert main(wrong) == 1
    assert "--round-scales is an option of --to gguf" in capsys.readouterr().err
    decoder().save_pretrained(tmp_path / "float")
    assert main(["export", str(tmp_path / "float"), "--to", "pt2", "-o", out]) == 1
    assert "make one with ternc quantize" in capsys.readouterr().err


def test_planes_with_scales_of_their_own_are_refused_by_name(tmp_path, ids):
    model = packed(planes=2, group_size=32, tie_scales=False)
    assert blocks_of(unpack(model.model.layers[0].mlp.up_proj.packed), "TQ2_0", True) is None
    pytest.importorskip("gguf")
    with pytest.raises(WeightShapeError, match="tie_scales=True"):
        export(model, "gguf", tmp_path / "model.gguf")
