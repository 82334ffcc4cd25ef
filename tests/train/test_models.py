"""Models that nobody here wrote, trained with every technique at once, through the same sites."""

import pytest
import torch
from torch import nn

import ternc
from ternc.train import (
    Distillation,
    Hadamard,
    Momentum,
    Optimization,
    Regularization,
    Schedule,
    TrainConfig,
    Trainer,
)

transformers = pytest.importorskip("transformers")

ALL = TrainConfig(
    schedule=Schedule(stages=[8, 4, 2, 1.58], stage_epochs=[1, 1, 1, 1]),
    hadamard=Hadamard(),
    dead_zone=1e-3,
    distillation=Distillation(
        alpha=0.7, beta=0.2, gamma=0.1, gradient="hvp", feature_layers=2, temperature=2.0
    ),
    regularization=Regularization(schedule="constant"),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
)


def gated():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def transposed():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [gated, transposed])
def test_everything_at_once(make):
    torch.manual_seed(0)
    teacher, student = make(), make()
    ids = torch.randint(64, (4, 12)) // 8 * 8
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, -3:] = -100
    names = {
        row.name for row in ternc.report(ternc.quantize(student, ternc.Config(planes=1))).rewritten
    }
    trainer = Trainer(student, ALL, teacher, log_every=1, progress=False)
    assert {site.name for site in ternc.sites(student)} == names
    rows = trainer.train([batch], num_epochs=8)
    assert rows[-1]["loss"] < rows[0]["loss"]
    for key in ("kl", "gradient", "feature", "penalty"):
        assert rows[-1][key] > 0, key
    packed = ternc.quantize(student)
    assert len(ternc.report(packed).rewritten) == len(names)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids).logits for m in (student, packed))
    assert torch.equal(a, b)
    generated = packed.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def test_encoder_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
    student = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 5))
    config = TrainConfig(schedule=ALL.schedule, optimization=Optimization(learning_rate=3e-3))
    batch = (torch.randn(6, 4, 32), torch.randint(5, (6, 4)))
    rows = Trainer(student, config, log_every=1, progress=False).train([batch], num_epochs=12)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    packed = ternc.quantize(student)
    with torch.no_grad():
        a, b = (m.eval()(batch[0]) for m in (student, packed))
    assert torch.equal(a, b)
