"""The pieces of `Trainer` in other loops: one's own, and that of transformers."""

import pytest
import torch
from torch import nn
from training import tiny_model, windows

import ternc
from ternc.errors import ConfigError
from ternc.train import (
    Distillation,
    Momentum,
    Optimization,
    Regularization,
    Schedule,
    TrainConfig,
    Trainer,
    prepare,
)
from ternc.train.callbacks import TrainingHooks, hf_callback
from ternc.train.optimizer import make_optimizers

CONFIG = TrainConfig(
    schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 1]),
    regularization=Regularization(schedule="constant"),
    momentum=Momentum(),
    distillation=Distillation(),
)


def test_hooks_do_what_the_trainer_does():
    """A plain loop around `TrainingHooks` makes the steps of `Trainer`."""
    config = CONFIG.replace(optimization=Optimization(clip=None))
    torch.manual_seed(4)
    teacher, model = tiny_model(), tiny_model()
    twin = prepare(model, config)
    trainer = Trainer(model, config, teacher, log_every=1, progress=False)
    batches = [windows(4, seed=i) for i in range(4)]
    trainer.train(batches, num_epochs=2)
    hooks = TrainingHooks(twin, config, teacher)
    optimizers = make_optimizers(twin, config.optimization)
    for step in range(8):
        batch = batches[step % 4]
        hooks.begin_step(step, 8, 4)
        ternc.train.optimizer.set_rates(optimizers, config.optimization, step, 8)
        twin.zero_grad()
        logits = twin(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = loss + hooks.distillation_loss(logits, {"ids": batch[:, :-1]}, None)
        loss.backward()
        hooks.before_optimizer()
        for optimizer in optimizers:
            optimizer.step()
    hooks.end()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    with pytest.raises(ConfigError, match="gamma=0"):
        TrainingHooks(twin, config.replace(distillation=Distillation(gamma=1.0)))


class Recorder:
    """A small run of transformers' own Trainer, and what was seen in it."""

    def __init__(self, folder, resume=None):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        teacher = transformers.LlamaForCausalLM(config)
        self.model = prepare(transformers.LlamaForCausalLM(config), CONFIG)
        callback = hf_callback(self.model, CONFIG, teacher)
        self.quantizers = quantizers = []
        (first, *_) = ternc.sites(self.model)

        class Watch(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                quantizers.append(first.quantizer)

        class Distilling(transformers.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **rest):
                loss, output = super().compute_loss(model, inputs, True, **rest)
                labels = inputs.get("labels")
                given = {name: v for name, v in inputs.items() if name != "labels"}
                loss = loss + callback.hooks.distillation_loss(output, given, labels)
                return (loss, output) if return_outputs else loss

        self.ids = torch.randint(64, (16, 12)) // 8 * 8
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=4, per_device_train_batch_size=4, report_to=[],
            gradient_accumulation_steps=2, save_strategy="epoch", logging_steps=1, use_cpu=True,
            disable_tqdm=True, learning_rate=3e-3,
        )  # fmt: skip
        trainer = Distilling(
            self.model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in self.ids],
            callbacks=[callback, Watch()],
        )
        trainer.train(resume_from_checkpoint=resume)
        self.rows = [row for row in trainer.state.log_history if "loss" in row]


def test_trainer_of_transformers(tmp_path):
    whole = Recorder(tmp_path)
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]
    assert all(0 < row["zero_fraction"] < 1 for row in whole.rows)
    assert any(row["flip_rate"] > 0 for row in whole.rows)
    assert whole.quantizers == ["16 -> 8 (0)", "8", "8 -> 1.58 (0)", *["1.58"] * 5]
    packed = ternc.quantize(whole.model.eval())
    with torch.no_grad():
        left, right = (m(input_ids=whole.ids).logits for m in (packed, whole.model))
    assert torch.equal(left, right)
    # On from the middle: the averages of the hooks come back with the rest.
    resumed = Recorder(tmp_path, resume=tmp_path / "checkpoint-4")
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    (tmp_path / "checkpoint-6" / "ternc.safetensors").unlink()
    with pytest.warns(UserWarning, match="start anew"):
        Recorder(tmp_path, resume=tmp_path / "checkpoint-6")
