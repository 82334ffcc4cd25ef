"""Two processes (gloo) make the steps of one: DDP, sharded weights (FSDP2), each compiled too."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from training import tiny_model, windows

import ternc
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
from ternc.train.sharding import full

SHARDED = TrainConfig(
    schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 2]),
    regularization=Regularization(strength=1e3, schedule="constant"),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
)
COMPILED = SHARDED.replace(schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 1]))
DISTILLED = COMPILED.replace(distillation=Distillation(alpha=0.5, beta=0.1, gradient="hvp"))
BALANCED = COMPILED.replace(distillation=Distillation(beta=1.0, balance=True))
CONFIGS = {"ddp": DISTILLED, "compiled": COMPILED, "sharded": SHARDED, "resumed": SHARDED}
EPOCHS = {"ddp": 3, "compiled": 3, "sharded": 4, "resumed": 4}
COMPILER = {"backend": "ternc", "options": {"inner": "aot_eager"}}


def student(config):
    torch.manual_seed(1)
    return prepare(tiny_model(), config)


def teacher(config):
    torch.manual_seed(2)
    return tiny_model() if config.distillation else None


def wrapped(kind, model):
    if kind in ("sharded", "resumed"):
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            if kind == "sharded":
                block.compile(**COMPILER)
            fully_shard(block)
        return fully_shard(model)
    wrapped = DistributedDataParallel(model)
    if kind == "compiled":
        wrapped = torch.compile(wrapped, **COMPILER)
    return wrapped


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batches = [batch[rank * 4 : rank * 4 + 4] for batch in windows(24).split(8)]
    for kind, config in CONFIGS.items():
        model = student(config)
        trainer = Trainer(
            wrapped(kind, model), None, teacher(config), log_every=1, progress=False,
            folder=folder / kind,
        )  # fmt: skip
        begun = folder / "alone" / "epoch-2" if kind == "resumed" else None
        trainer.train(batches, batches, num_epochs=EPOCHS[kind], save_every=1, resume=begun)
        state = {name: full(p.detach()) for name, p in model.named_parameters()}
        if kind == "resumed":
            with pytest.raises(ternc.errors.TrainingError, match=r"balance=True .* sharded"):
                Trainer(model, BALANCED, student(SHARDED), progress=False).train(batches)
        if rank == 0:
            torch.save((trainer.log.rows, state), folder / f"{kind}.pt")
    trainer = Trainer(student(BALANCED), None, teacher(BALANCED), progress=False)
    trainer.train(batches[:1])
    torch.save(trainer.distiller.balance, folder / f"balance.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes wrote, in all three ways: they are started once."""
    path = tmp_path_factory.mktemp("processes")
    alone("sharded", folder=path / "alone", save_every=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, path), nprocs=2)
    return path


def alone(kind, folder=None, **options):
    """The run of one process on the whole batches."""
    config = CONFIGS[kind]
    trainer = Trainer(
        student(config), None, teacher(config), log_every=1, progress=False, folder=folder
    )
    batches = list(windows(24).split(8))
    trainer.train(batches, batches, num_epochs=EPOCHS[kind], **options)
    return trainer


def column(rows, name):
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_are_one(folder, kind):
    rows, state = torch.load(folder / f"{kind}.pt")
    one = alone(kind)
    expected = column(one.log.rows, "validation_loss")
    assert column(rows, "validation_loss") == pytest.approx(expected, rel=1e-2)
    changes = [(state[name] - p).norm() / p.norm() for name, p in one.inner.named_parameters()]
    assert max(changes) < 5e-2
    written = folder / kind / f"epoch-{EPOCHS[kind]}"
    weights = "sharded" if CONFIGS[kind] is SHARDED else "model.safetensors"
    for name in ("random.0.safetensors", "random.1.safetensors", weights):
        assert (written / name).exists()


def test_every_process_has_the_same_balance(folder):
    first, second = (torch.load(folder / f"balance.{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second) and not torch.equal(first, torch.ones(3))


def test_a_sharded_run_goes_on_in_one_process(folder):
    files = {path.name for path in (folder / "sharded" / "epoch-2" / "sharded").iterdir()}
    assert len(files) == 2 and not (folder / "sharded" / "epoch-2" / "model.safetensors").exists()
    one = alone("sharded")
    resumed = alone("sharded", resume=folder / "sharded" / "epoch-2")
    assert column(resumed.log.rows, "step") == column(one.log.rows, "step")
    expected = column(one.log.rows, "validation_loss")
    assert column(resumed.log.rows, "validation_loss") == pytest.approx(expected, rel=1e-2)
    expected = column(one.log.rows, "loss")[-4:]
    assert column(resumed.log.rows, "loss")[-4:] == pytest.approx(expected, rel=3e-2)
    # The sharded run's own end, loaded into a model of one process, is packed.
    last = Trainer(student(SHARDED), log_every=1, progress=False)
    last.load(folder / "sharded" / "epoch-4")
    packed = ternc.quantize(ternc.train.finish(last.inner))
    assert len(ternc.report(packed).rewritten) == 14


def test_a_damaged_sharded_checkpoint_is_refused(folder):
    shards = sorted((folder / "sharded" / "epoch-1" / "sharded").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    trainer = Trainer(student(SHARDED), progress=False)
    with pytest.raises(ternc.errors.CheckpointError, match="damaged"):
        trainer.load(folder / "sharded" / "epoch-1")
    for shard in shards:
        shard.unlink()
    with pytest.raises(ternc.errors.CheckpointError, match="is missing"):
        trainer.load(folder / "sharded" / "epoch-1")
