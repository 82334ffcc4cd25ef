"""Text -> a trained byte-level decoder, within a budget of seconds; to a folder and back.

Plain torch: AdamW, warm-up and cosine over the time budget, products in bf16 on a GPU. The model is
kept as bf16 numbers in files small enough to be carried about.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ternc.demo.model import ByteDecoder

FILE_BYTES = 14 << 20
WARM_UP = 0.02
"""Part of the budget."""
SYNCHRONISED = 10
"""Steps between two looks at the clock."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size and length of everything."""

    width: int = 512
    layers: int = 8
    heads: int = 8
    hidden: int = 1408
    context: int = 1024
    batch: int = 64
    seconds: float = 130.0
    rate: float = 2e-3
    sequences: int = 256
    """Windows to calibrate on."""
    calibration_batch: int = 16
    scored_batch: int = 64
    judged_sequences: int = 128
    """Windows of the scored text on which predictions are compared with the float model's."""
    tuning_epochs: int = 3
    reconstruction_steps: int = 800
    reconstruction_sequences: int = 2048
    """Windows to reconstruct on: codes are many, and learn a few windows by heart."""
    seed: int = 0

    @classmethod
    def smoke(cls) -> Settings:
        """A model of 0.1 M parameters, trained for two seconds."""
        return cls(
            width=64, layers=2, heads=2, hidden=128, context=64, batch=8, seconds=2.0,
            sequences=32, calibration_batch=4, scored_batch=8, tuning_epochs=1,
            reconstruction_steps=8, reconstruction_sequences=32, judged_sequences=4,
        )  # fmt: skip


def new_model(settings: Settings) -> nn.Module:
    """The decoder without training, from the seed."""
    torch.manual_seed(settings.seed)
    return ByteDecoder(
        settings.width, settings.layers, settings.heads, settings.hidden, settings.context
    )


def train(
    model: nn.Module,
    corpus: bytes,
    settings: Settings,
    *,
    compiled: bool,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Trains `model` in place for `settings.seconds`, compilation not counted; says how much."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).to(device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    reach = torch.arange(settings.context + 1, device=device)
    forward = torch.compile(model) if compiled and on_gpu else model
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.95), fused=on_gpu,
    )  # fmt: skip

    def step(rate: float) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(
            len(text) - settings.context, (settings.batch, 1), generator=generator, device=device
        )
        ids = text[starts + reach].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = forward(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step(0.0).item()  # compiles
    start = time.monotonic()
    steps, elapsed, shown = 0, 0.0, 0.0
    while elapsed < settings.seconds:
        share = elapsed / settings.seconds
        warm = min(1.0, (share + 1e-3) / WARM_UP)
        loss = step(settings.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2))
        steps += 1
        if steps % SYNCHRONISED == 0 or not on_gpu:
            bits = float(loss) / math.log(2)
            elapsed = time.monotonic() - start
            if elapsed - shown > 10:
                shown = elapsed
                say(f"{elapsed:4.0f} s, step {steps}, {bits:.3f} bits per byte of a batch")
    model.zero_grad(set_to_none=True)
    model.eval()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "bytes": steps * settings.batch * settings.context,
        "seconds": time.monotonic() - start,
        "last_batch": bits,
    }


def save_model(model: nn.Module, folder: Path) -> None:
    """The parameters as bf16 in files of at most `FILE_BYTES`, and which file holds which."""
    from safetensors.torch import save_file

    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        value = parameter.detach().bfloat16().cpu().contiguous()
        if size + value.nbytes > FILE_BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = value
        size += value.nbytes
    index = {}
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))
    text = json.dumps({"weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def load_model(model: nn.Module, folder: Path) -> nn.Module:
    """The parameters of `save_model`, in the dtype of `model`."""
    from safetensors.torch import load_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    state = {}
    for name in sorted(set(index.values())):
        state.update(load_file(folder / name))
    model.load_state_dict(state)
    return model.eval()
