"""Models of transformers: quantised, saved, and loaded again without a skeleton."""

import json

import pytest
import torch
from torch import nn

from ternc.checkpoint import MANIFEST, load, save
from ternc.errors import CheckpointError, UnsupportedModelError
from ternc.pretrained import parameters_on_meta
from ternc.quantization import quantize

transformers = pytest.importorskip("transformers")


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=1,
        n_head=2,
        vocab_size=40,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
    )
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_bert])
def test_transformers_models_load_alone(tmp_path, make_model):
    model = make_model()
    q = quantize(model)
    assert type(q) is type(model)
    save(q, tmp_path)
    r = load(tmp_path)
    assert type(r) is type(model) and not r.training
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(r(ids, attention_mask=mask)[0], q(ids, attention_mask=mask)[0])
    assert {n: b.device.type for n, b in r.named_buffers()} == {
        n: "cpu" for n, _ in q.named_buffers()
    }
    if hasattr(q, "lm_head"):
        assert r.lm_head.weight is r.get_input_embeddings().weight
        arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        arguments["pad_token_id"] = 0
        assert torch.equal(r.generate(ids, **arguments), q.generate(ids, **arguments))


def rewrite_builder(folder, name):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["builder"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_builder_that_is_no_model_is_refused(tmp_path):
    save(quantize(tiny_bert()), tmp_path)
    for name in ("AutoTokenizer", "pipeline", "os", "NoSuchClass"):
        rewrite_builder(tmp_path, name)
        with pytest.raises(UnsupportedModelError, match=name):
            load(tmp_path)
    rewrite_builder(tmp_path, "LlamaForCausalLM")
    with pytest.raises(CheckpointError):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_a_class_that_transformers_does_not_have_needs_a_skeleton(tmp_path):
    class Mine(transformers.BertModel):
        pass

    q = quantize(Mine(tiny_bert().config).eval())
    save(q, tmp_path)
    with pytest.raises(CheckpointError, match="Mine; pass model="):
        load(tmp_path)
    ids = torch.arange(3, 15).view(2, 6)
    r = load(tmp_path, Mine(tiny_bert().config).eval())
    with torch.no_grad():
        assert torch.equal(r(ids)[0], q(ids)[0])


def test_half_precision_models_come_back_bit_for_bit(tmp_path):
    q = quantize(tiny_llama().bfloat16())
    save(q, tmp_path)
    r = load(tmp_path)
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.equal(r(ids)[0], q(ids)[0])
    assert {b.dtype for b in r.buffers()} == {b.dtype for b in q.buffers()}


def test_a_transposed_linear_of_transformers_is_found():
    q = quantize(tiny_gpt2())
    assert q.transformer.h[0].attn.c_attn.transposed
    assert {row.pattern for row in q._ternc_rows} == {"transposed linear", "linear"}


def test_parameters_on_meta_leaves_buffers_and_ties():
    with parameters_on_meta():
        layer = nn.BatchNorm1d(4)
        tied = nn.Linear(2, 2)
        tied.again = tied.weight
    assert layer.weight.is_meta and not layer.running_mean.is_meta
    assert tied.again is tied.weight
    assert not nn.Linear(2, 2).weight.is_meta
