"""Two processes (gloo) make the steps of one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from training import tiny_model, windows

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

CONFIG = TrainConfig(
    schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 1]),
    distillation=Distillation(alpha=0.5, beta=0.1, gradient="hvp"),
    regularization=Regularization(schedule="constant"),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
)
EPOCHS = 3


def models(config):
    torch.manual_seed(1)
    return prepare(tiny_model(), config), tiny_model()


def worker(rank, port, compiled, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    config = CONFIG.replace(distillation=None) if compiled else CONFIG
    student, teacher = models(config)
    wrapped = DistributedDataParallel(student)
    if compiled:
        wrapped = torch.compile(wrapped, backend="ternc", options={"inner": "aot_eager"})
    trainer = Trainer(
        wrapped, None, None if compiled else teacher, log_every=1, progress=False, folder=folder
    )
    batches = [batch[rank * 4 : rank * 4 + 4] for batch in windows(24).split(8)]
    trainer.train(batches, batches, num_epochs=EPOCHS, save_every=EPOCHS)
    if rank == 0:
        state = {name: p.detach() for name, p in student.named_parameters()}
        torch.save((trainer.log.rows, state), f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_are_one(tmp_path, compiled):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, compiled, str(tmp_path)), nprocs=2)
    rows, state = torch.load(tmp_path / "result.pt")
    config = CONFIG.replace(distillation=None) if compiled else CONFIG
    student, teacher = models(config)
    alone = Trainer(student, None, None if compiled else teacher, log_every=1, progress=False)
    batches = list(windows(24).split(8))
    alone.train(batches, batches, num_epochs=EPOCHS)
    seen = [row["validation_loss"] for row in rows if "validation_loss" in row]
    expected = [row["validation_loss"] for row in alone.log.rows if "validation_loss" in row]
    assert seen == pytest.approx(expected, rel=1e-2)
    changes = [(state[name] - p).norm() / p.norm() for name, p in student.named_parameters()]
    assert max(changes) < 5e-2
    files = {path.name for path in (tmp_path / f"epoch-{EPOCHS}").iterdir()}
    assert {"random.0.safetensors", "random.1.safetensors", "model.safetensors"} <= files
