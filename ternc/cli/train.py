"""`ternc train MODEL_DIR --text FILE -o OUT`: a float language model -> a trained, packed one."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ternc.cli.console import add_device_option, add_json_option, print_json, say, text_file
from ternc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc train`."""
    from ternc.train.presets import PRESETS

    add = parser.add_argument
    add("model", type=Path, metavar="HF_MODEL_DIR", help="folder with config.json")
    add(
        "--text",
        type=text_file,
        required=True,
        help="UTF-8 text file; its last twentieth is scored on",
    )
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write")
    add(
        "--preset",
        choices=sorted(PRESETS),
        help="a recipe; default: least-squares scales, ternary from the first step",
    )
    add("--distil", action="store_true", help="learn from the float model's logits too")
    add("--steps", type=int, default=1000, help="optimiser steps (1000)")
    add("--batch", type=int, default=8, help="windows of a step (8)")
    add("--context", type=int, default=256, help="tokens of a window (256)")
    add("--learning-rate", type=float, default=3e-4, help="peak (3e-4)")
    add("--compile", action="store_true", help="torch.compile(model, backend='ternc')")
    add("--resume", action="store_true", help="go on with OUT/run, as if it had not stopped")
    add(
        "--save-every", type=int, default=200, help="steps between two checkpoints in OUT/run (200)"
    )
    add_device_option(parser, "best")
    add("--seed", type=int, default=0)
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Train, pack, write; print the losses and the report."""
    import ternc
    from ternc.backend import ternc_backend
    from ternc.cli.huggingface import (
        copy_side_files,
        load_model,
        refuse_overwriting,
        within_positions,
    )

    refuse_overwriting(namespace.model, namespace.output)
    say(f"loading {namespace.model}")
    model = load_model(namespace.model).to(namespace.device)
    namespace.context = within_positions(model, namespace.context)
    train, held_out = _loaders(namespace)
    before = _loss(model, held_out)
    config = _config(namespace)
    teacher = copy.deepcopy(model) if config.distillation is not None else None
    student = ternc.train.prepare(model, config, inplace=True)
    handed = torch.compile(student, backend=ternc_backend) if namespace.compile else student
    run_folder = namespace.output / "run"
    trainer = ternc.train.Trainer(handed, config, teacher, folder=run_folder)  # type: ignore[arg-type]
    last = _last(run_folder) if namespace.resume else None
    rows = trainer.train(train, None, _parts(namespace), save_every=1, resume=last)
    packed = ternc.quantize(student.eval(), inplace=True)
    ternc.save(packed, namespace.output)
    copy_side_files(namespace.model, namespace.output)
    say(f"wrote {namespace.output}")
    report = ternc.report(packed)
    result = {
        "steps": trainer.step,
        "training_loss": rows[-1]["loss"],
        "held_out_loss_float": before,
        "held_out_loss_packed": _loss(packed, held_out),
    }
    if namespace.json:
        print_json({**result, "report": report.to_dict()})
    else:
        print(report)
        for name, value in result.items():
            print(f"{name:22} {value:,.4f}" if isinstance(value, float) else f"{name:22} {value:,}")
    return 0


class TokenWindows:
    """Random windows of a text as batches {"input_ids", "labels"} int64 [batch, length]."""

    def __init__(self, ids: torch.Tensor, batch: int, length: int, count: int, seed: int) -> None:
        self.ids, self.batch, self.length, self.count = ids, batch, length, count
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        shape, last = (self.count, self.batch, 1), len(self.ids) - self.length + 1
        starts = torch.randint(last, shape, generator=self.generator).to(self.ids.device)
        reach = torch.arange(self.length, device=self.ids.device)
        for rows in starts:
            ids = self.ids[rows + reach]
            yield {"input_ids": ids, "labels": ids}


def _loaders(namespace: argparse.Namespace) -> tuple[TokenWindows, list[dict[str, torch.Tensor]]]:
    """Batches to train on, and those of the held-out end of the text."""
    from ternc.cli.huggingface import tokenizer_of

    tokenizer = tokenizer_of(namespace.model)
    text = namespace.text.read_bytes()
    if tokenizer is None:
        ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    else:
        line = text.decode("utf-8", errors="ignore")
        ids = torch.tensor(tokenizer(line, add_special_tokens=False).input_ids)
    cut, length = len(ids) - len(ids) // 20, namespace.context
    if len(ids) - cut < length:
        raise InputError(
            f"{namespace.text} has {len(ids)} tokens; its last twentieth is scored on and holds no "
            f"window of {length}: give a longer text or a smaller --context"
        )
    ids = ids.to(namespace.device)
    count = max(1, namespace.steps // _parts(namespace))
    train = TokenWindows(ids[:cut], namespace.batch, length, count, namespace.seed)
    windows = ids[cut:][: (len(ids) - cut) // length * length].view(-1, length)
    scored = windows[: 8 * namespace.batch].split(namespace.batch)
    return train, [{"input_ids": part, "labels": part} for part in scored]


def _parts(namespace: argparse.Namespace) -> int:
    """Passes of the loader: a checkpoint is written after each."""
    return max(1, namespace.steps // namespace.save_every)


@torch.no_grad()
def _loss(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean over batches of the loss of the next token, in nats."""
    from ternc.train.task import cross_entropy

    losses = [cross_entropy(model(input_ids=b["input_ids"]), b) for b in batches]
    return torch.stack(losses).mean().item()


def _config(namespace: argparse.Namespace) -> Any:
    from ternc.train import Distillation, TrainConfig, preset

    config = TrainConfig() if namespace.preset is None else preset(namespace.preset)
    rate = dataclasses.replace(config.optimization, learning_rate=namespace.learning_rate)
    config = config.replace(optimization=rate)
    if namespace.device == "cuda":
        config = config.replace(autocast="bfloat16")
    if namespace.distil and config.distillation is None:
        config = config.replace(distillation=Distillation())
    return config


def _last(folder: Path) -> Path:
    """The newest checkpoint.

    Raises:
        InputError: there is none.
    """
    found = [path.parent for path in folder.glob("epoch-*/training.json")]
    if not found:
        raise InputError(f"{folder} holds no checkpoint to go on with; leave --resume out")
    return max(found, key=lambda path: int(path.name.removeprefix("epoch-")))
