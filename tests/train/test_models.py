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
    activation_schedule=Schedule(stages=[8], stage_epochs=[2]),
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
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def transposed():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bidirectional():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def sequence_to_sequence():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make, turned",
    [
        (gated, {"o_proj", "down_proj"}),
        (transposed, {"attn.c_proj", "mlp.c_proj"}),
        (bidirectional, {"attention.output.dense", "0.output.dense"}),
    ],
)
def test_everything_at_once(make, turned):
    """One of the three is compiled: nothing is recompiled over the whole schedule."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    teacher, student = make(), make()
    ids = torch.randint(64, (4, 12)) // 8 * 8
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, -3:] = -100
    names = {
        row.name for row in ternc.report(ternc.quantize(student, ternc.Config(planes=1))).rewritten
    }
    handed = ternc.train.prepare(student, ALL, inplace=True)
    if make is gated:
        options = {"inner": "aot_eager"}
        handed = torch.compile(student, backend="ternc", fullgraph=True, options=options)
    trainer = Trainer(handed, None, teacher, log_every=1, progress=False)
    found = ternc.sites(student)
    assert {site.name for site in found} == names
    rotated = [site.name for site in found if site.module.settings.rotation is not None]
    assert rotated and all(name.endswith(tuple(turned)) for name in rotated)
    assert all(any(name.endswith(end) for name in rotated) for end in turned)
    with torch._dynamo.config.patch(error_on_recompile=True):
        rows = trainer.train([batch], num_epochs=8)
    assert rows[-1]["loss"] < rows[0]["loss"]
    for key in ("kl", "gradient", "feature", "penalty"):
        assert rows[-1][key] > 0, key
    packed = ternc.quantize(student)
    assert len(ternc.report(packed).rewritten) == len(names)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids).logits for m in (student, packed))
    assert torch.equal(a, b)
    if make is bidirectional:
        return
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


@pytest.mark.parametrize("make", [gated, transposed, bidirectional, sequence_to_sequence])
def test_labels_are_scored_where_transformers_scores_them(make):
    """On the next position for causal models, on the same one where gaps are filled."""
    torch.manual_seed(0)
    model, ids = make(), torch.randint(64, (3, 12))
    batch = {"input_ids": ids, "labels": ids.flip(1).clone()}
    batch["labels"][:, -3:] = -100
    if make is sequence_to_sequence:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    untouched = TrainConfig(weights=ternc.Config(planes=1, exclude=("*",)))
    trainer = Trainer(model, untouched, progress=False)
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert trainer.evaluate([batch])["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_transform_in_no_layer_is_told():
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.warns(UserWarning, match=r"no name of the 2 prepared layers \(0, 1"):
        ternc.train.prepare(layers, TrainConfig(hadamard=Hadamard()))


def test_balance_needs_a_site():
    config = TrainConfig(
        weights=ternc.Config(planes=1, exclude=("*",)), distillation=Distillation(balance=True)
    )
    batch = (torch.randn(4, 8), torch.randint(3, (4,)))
    trainer = Trainer(nn.Linear(8, 3), config, nn.Linear(8, 3), progress=False)
    with pytest.raises(ternc.errors.TrainingError, match=r"balance=True .* has none"):
        trainer.train([batch])
