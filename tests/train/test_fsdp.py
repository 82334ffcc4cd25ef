"""Two processes with sharded weights (FSDP2, gloo) make the steps of one, and go on as one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training import tiny_model, windows

import ternc
from ternc.train import (
    Momentum,
    Optimization,
    Regularization,
    Schedule,
    TrainConfig,
    Trainer,
    prepare,
)

CONFIG = TrainConfig(
    schedule=Schedule(stages=[8, 1.58], stage_epochs=[1, 2]),
    regularization=Regularization(schedule="constant"),
    momentum=Momentum(),
    optimization=Optimization(learning_rate=3e-3),
)


def student():
    torch.manual_seed(1)
    return prepare(tiny_model(), CONFIG)


def worker(rank, port, folder):
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = student()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    trainer = Trainer(model, log_every=1, progress=False, folder=folder)
    batches = [batch[rank * 4 : rank * 4 + 4] for batch in windows(24).split(8)]
    trainer.train(batches, batches, num_epochs=4, save_every=2)
    dist.destroy_process_group()


def test_sharded_training(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    files = {path.name for path in (tmp_path / "epoch-2" / "sharded").iterdir()}
    assert len(files) == 2 and not (tmp_path / "epoch-2" / "model.safetensors").exists()
    batches = list(windows(24).split(8))
    alone = Trainer(student(), log_every=1, progress=False)
    alone.train(batches, batches, num_epochs=4)
    # The sharded run's checkpoint, taken up by one process, ends where one process ended.
    resumed = Trainer(student(), log_every=1, progress=False)
    resumed.train(batches, batches, num_epochs=4, resume=tmp_path / "epoch-2")
    for run in (resumed.log.rows, alone.log.rows):
        assert [row["step"] for row in run] == [row["step"] for row in alone.log.rows]
    seen = [row["validation_loss"] for row in resumed.log.rows if "validation_loss" in row]
    expected = [row["validation_loss"] for row in alone.log.rows if "validation_loss" in row]
    assert seen == pytest.approx(expected, rel=1e-2)
    losses = [row["loss"] for row in resumed.log.rows[-4:] if "loss" in row]
    assert losses == pytest.approx(
        [row["loss"] for row in alone.log.rows[-4:] if "loss" in row], rel=3e-2
    )
    # The sharded run's own end, loaded into a model of one process, is packed.
    last = Trainer(student(), log_every=1, progress=False)
    last.load(tmp_path / "epoch-4")
    packed = ternc.quantize(ternc.train.finish(last.inner))
    assert len(ternc.report(packed).rewritten) == 14
