"""Training on several processes: the losses and weights of one, with DDP and with FSDP2.

    torchrun --standalone --nproc-per-node 2 benchmarks/train_distributed.py [--out FILE]

NCCL where there is a GPU for each process, else gloo. Blocks are compiled with the ternc backend.
Every process also trains alone on the whole batches: what the others are compared with. Exit status
1 where a loss differs by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import ternc  # noqa: E402
from ternc.backend import ternc_backend  # noqa: E402
from ternc.demo.model import ByteDecoder  # noqa: E402
from ternc.train import Optimization, TrainConfig, Trainer, preset  # noqa: E402

TOLERANCE = 2e-2
"""Relative difference of a loss: sums round in another order, and a trit or an int8 step flips."""

STEPS, BATCH, CONTEXT = 30, 16, 256

CONFIG: TrainConfig = preset("warm_start").replace(optimization=Optimization(learning_rate=2e-3))


def main() -> int:
    """Command line; the first process prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    result = compare(device, not arguments.eager)
    if rank == 0:
        print(json.dumps(result, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()
    return int(any(r["largest_loss_difference"] > TOLERANCE for r in result["modes"].values()))


def compare(device: torch.device, compiled: bool) -> dict:
    """Losses of each way of training, and how far they and the weights are from one process."""
    whole = text(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    share = BATCH // world
    own = [batch[rank * share : (rank + 1) * share] for batch in whole]
    alone, weights, seconds = train(student(device, compiled), whole)
    modes = {}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        losses, found, took = train(wrap(student(device, compiled)), own)
        mean = torch.tensor(losses, device=device, dtype=torch.float64)
        dist.all_reduce(mean)
        mean = (mean / world).tolist()
        modes[name] = {
            "losses": mean,
            "seconds": took,
            "largest_loss_difference": max(
                abs(a - b) / b for a, b in zip(mean, alone, strict=True)
            ),
            "largest_weight_difference": max(
                ((found[key] - value).norm() / value.norm()).item()
                for key, value in weights.items()
            ),
        }
    return {
        "backend": dist.get_backend(),
        "processes": world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiled": compiled,
        "one_process": {"losses": alone, "seconds": seconds},
        "modes": modes,
    }


def train(
    model: torch.nn.Module, batches: list[torch.Tensor]
) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """Losses by step, weights by name, seconds without the first step."""
    marks: list[float] = []
    trainer = Trainer(
        model, CONFIG, log_every=1, progress=False,
        callbacks=[lambda _trainer, _row: marks.append(time.perf_counter())],
    )  # fmt: skip
    rows = trainer.train(batches)
    weights = {name: gathered(p.detach()) for name, p in trainer.inner.named_parameters()}
    return [row["loss"] for row in rows], weights, marks[-1] - marks[0]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def student(device: torch.device, compiled: bool) -> torch.nn.Module:
    """The same student in every process."""
    torch.manual_seed(1)
    model = ByteDecoder(256, 2, 4, 512, CONTEXT).to(device)
    model = ternc.train.prepare(model, CONFIG, inplace=True)
    if compiled:
        for block in model.blocks:
            block.compile(backend=ternc_backend, dynamic=False)
    return model


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2: every block, then the rest."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def text(device: torch.device) -> list[torch.Tensor]:
    """Batches int64 [BATCH, CONTEXT + 1] of this file's bytes, the same in every process."""
    body = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    reach = torch.arange(CONTEXT + 1)
    shape, last = (STEPS, BATCH, 1), len(body) - CONTEXT
    starts = torch.randint(last, shape, generator=generator)
    return [body[rows + reach].long().to(device) for rows in starts]


if __name__ == "__main__":
    raise SystemExit(main())
