"""`Trainer`: resume bit for bit, accumulation, evaluation, logs, compiled students."""

import csv
import importlib.util
import itertools
import sys

import pytest
import torch
from training import loader, tiny_model, windows

import ternc
from ternc.errors import CheckpointError, InputError, MissingExtraError, TrainingError
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
from ternc.train.task import cross_entropy

EVERYTHING = TrainConfig(
    schedule=Schedule(stages=[8, 4, 2, 1.58], stage_epochs=[1, 1, 1, 1]),
    activation_schedule=Schedule(stages=[8], stage_epochs=[2]),
    hadamard=Hadamard(),
    dead_zone=1e-3,
    distillation=Distillation(alpha=0.7, beta=0.2, gamma=0.1, temperature=2.0, balance=True),
    regularization=Regularization(schedule="constant"),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
    accumulate=2,
)


def run(config, epochs, tmp_path=None, teacher=None, **options):
    torch.manual_seed(1)
    model = tiny_model()
    trainer = Trainer(model, config, teacher, folder=tmp_path, log_every=1, progress=False)
    trainer.train(loader(), loader(seed=9, shuffle=False), num_epochs=epochs, **options)
    return trainer


def teacher_model():
    torch.manual_seed(5)
    return tiny_model()


def test_loss_falls_and_the_packed_model_is_the_trained_one():
    config = TrainConfig(optimization=Optimization(learning_rate=1e-2))
    trainer = run(config, 12)
    losses = [row["loss"] for row in trainer.log.rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    packed = ternc.quantize(trainer.inner)
    ids = windows(4)[:, :-1]
    trainer.inner.eval()
    with torch.no_grad():
        assert torch.equal(packed(ids), trainer.inner(ids))


@pytest.mark.parametrize("saved_at", ["boundary", "middle"])
def test_resume_is_bit_exact(tmp_path, saved_at):
    """One run equals some steps, a checkpoint, and the rest from another random state."""
    torch.manual_seed(1)
    whole = Trainer(tiny_model(), EVERYTHING, teacher_model(), log_every=1, progress=False)
    whole.train(loader(), loader(seed=9, shuffle=False), num_epochs=4)

    def save_now(trainer, row):
        if trainer.step == (3 if saved_at == "boundary" else 4) and "loss" in row:
            trainer.save(tmp_path / "middle")

    torch.manual_seed(1)
    first = Trainer(
        tiny_model(), EVERYTHING, teacher_model(), log_every=1, progress=False,
        callbacks=[save_now], folder=tmp_path,
    )  # fmt: skip
    first.train(loader(), loader(seed=9, shuffle=False), num_epochs=4, save_every=1)
    torch.manual_seed(77)
    second = Trainer(tiny_model(), EVERYTHING, teacher_model(), log_every=1, progress=False)
    source = tmp_path / ("epoch-1" if saved_at == "boundary" else "middle")
    second.train(loader(order=3), loader(seed=9, shuffle=False), num_epochs=4, resume=source)
    assert second.step == whole.step
    for (name, a), b in zip(
        whole.inner.state_dict().items(), second.inner.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.log.rows == second.log.rows


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    trainer = run(TrainConfig(), 1, tmp_path, save_every=1)
    other = Trainer(tiny_model(), TrainConfig(dead_zone=0.5), progress=False)
    with pytest.raises(CheckpointError, match="dead_zone"):
        other.train(loader(), num_epochs=1, resume=tmp_path / "epoch-1")
    (tmp_path / "epoch-1" / "training.safetensors").write_bytes(b"broken")
    again = Trainer(tiny_model(), trainer.config, progress=False)
    with pytest.raises(CheckpointError, match="damaged"):
        again.train(loader(), num_epochs=1, resume=tmp_path / "epoch-1")


def test_accumulation_equals_one_large_batch():
    config = TrainConfig(optimization=Optimization(learning_rate=1e-2))
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        trainer = Trainer(
            tiny_model(), config.replace(accumulate=accumulate), log_every=1, progress=False
        )
        trainer.train(loader(batch, shuffle=False), num_epochs=1)
        found.append([row["loss"] for row in trainer.log.rows])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_log_holds_what_it_says(tmp_path):
    trainer = run(EVERYTHING, 2, tmp_path, teacher_model(), save_every=2)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert len(rows) == len(trainer.log.rows) == 3 * 2 + 2
    for key in ("loss", "kl", "gradient", "feature", "penalty", "zero_fraction", "flip_rate"):
        values = [row[key] for row in trainer.log.rows if key in row]
        assert values and all(value >= 0 for value in values), key
    assert any(row.get("flip_rate", 0) > 0 for row in trainer.log.rows)
    assert (tmp_path / "epoch-2" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


def test_progress_and_curves(tmp_path, capsys):
    """A line on stderr, the last step always; curves.png where matplotlib is installed."""
    torch.manual_seed(1)
    trainer = Trainer(tiny_model(), TrainConfig(), folder=tmp_path, log_every=2, progress=True)
    trainer.train(loader(), num_epochs=1)
    (*_, last) = capsys.readouterr().err.strip().splitlines()
    row = trainer.log.rows[-1]
    assert last.startswith("train: step 6 of 6, ")
    for name in ("loss", "zero_fraction", "flip_rate", "learning_rate"):
        assert f"{name} {row[name]:.4g}" in last
    installed = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "curves.png").is_file() == installed
    if installed:
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluation_is_of_the_final_quantisers():
    config = TrainConfig(schedule=Schedule(stages=[16, 1.58], stage_epochs=[50, 50]))
    torch.manual_seed(1)
    trainer = Trainer(tiny_model(), config, progress=False)
    as_float = trainer.evaluate(loader(), final=False)["loss"]
    final = trainer.evaluate(loader())["loss"]
    assert trainer.sites[0].quantizer == "16"
    assert as_float != final
    packed = ternc.quantize(ternc.train.finish(trainer.inner))
    total = [
        torch.nn.functional.cross_entropy(packed(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())
        for b in loader()
    ]
    assert final == pytest.approx(torch.stack(total).mean().item(), rel=1e-6)


def test_bf16_autocast_trains():
    config = TrainConfig(autocast="bfloat16", optimization=Optimization(learning_rate=1e-2))
    losses = [row["loss"] for row in run(config, 6).log.rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_mistakes_are_named(tmp_path):
    distil = TrainConfig(distillation=Distillation())
    with pytest.raises(TrainingError, match="needs a teacher"):
        run(distil, 1)
    with pytest.raises(TrainingError, match="needs a folder"):
        run(TrainConfig(), 1, save_every=1)
    with pytest.raises(TrainingError, match="before the first step"):
        run(distil, 1, teacher=teacher_model()).set_teacher_model(teacher_model())
    with pytest.raises(InputError, match="no batch"):
        Trainer(tiny_model(), TrainConfig(), progress=False).train([])
    with pytest.raises(InputError, match="a generator without a length"):
        Trainer(tiny_model(), TrainConfig(), progress=False).train(batch for batch in windows(1))
    with pytest.raises(InputError, match="the batch has no targets"):
        cross_entropy(torch.zeros(2, 8), torch.randn(2, 4))
    with pytest.raises(TrainingError, match="the loss is"):
        run(TrainConfig(optimization=Optimization(learning_rate=1e30, clip=None)), 3)


def test_a_compiled_student_trains_without_recompilation():
    torch._dynamo.reset()
    config = TrainConfig(
        schedule=Schedule(stages=[8, 4, 2, 1.58], stage_epochs=[1, 1, 1, 1]),
        optimization=Optimization(learning_rate=3e-3),
    )
    torch.manual_seed(1)
    student = ternc.train.prepare(tiny_model(), config)
    plain = ternc.train.prepare(tiny_model(), config)
    plain.load_state_dict(student.state_dict())
    compiled = torch.compile(
        student, backend="ternc", options={"inner": "aot_eager"}, fullgraph=True
    )
    counts = itertools.count()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer = Trainer(
            compiled, progress=False, log_every=1, callbacks=[lambda *_: next(counts)]
        )
        trainer.train(loader(), num_epochs=5)
    assert next(counts) == 30
    reference = Trainer(plain, progress=False, log_every=1)
    reference.train(loader(), num_epochs=5)
    seen = [row["loss"] for row in trainer.log.rows]
    assert seen == pytest.approx([row["loss"] for row in reference.log.rows], rel=2e-2)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write = ternc.train.tensorboard(tmp_path / "tb")
    trainer = Trainer(tiny_model(), log_every=1, progress=False, callbacks=[write])
    rows = trainer.train(loader())
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == {row["step"]: pytest.approx(row["loss"]) for row in rows if "loss" in row}


def test_tensorboard_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"ternc\[tensorboard\]"):
        ternc.train.tensorboard("folder")
