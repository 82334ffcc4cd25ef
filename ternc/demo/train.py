"""Corpus bytes -> a trained byte-level decoder, within a budget of seconds.

Matrices inside the blocks are trained with Muon (Jordan et al. 2024), the rest with AdamW; warm-up,
then linear decay over the time budget, so the schedule ends with the budget on any machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

WARM_UP_STEPS = 20
REPORT_EVERY = 10.0
"""Seconds between two lines of progress."""


def train(
    model: torch.nn.Module,
    text: torch.Tensor,
    *,
    seconds: float,
    batch: int,
    length: int,
    learning_rate: float = 1e-2,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Train `model` in place on `text` (uint8 [bytes]) for `seconds`; returns the steps made."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model, learning_rate)
    start = time.monotonic()
    steps, next_line = 0, REPORT_EVERY
    while (elapsed := time.monotonic() - start) < seconds:
        factor = min(1.0, (steps + 1) / WARM_UP_STEPS) * max(0.02, 1.0 - elapsed / seconds)
        inputs, targets = sample(text, batch, length, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            optimizer.step()
        steps += 1
        if elapsed >= next_line:
            bits = loss.item() / math.log(2)
            say(f"  {elapsed:4.0f} s  step {steps:5d}  {bits:.3f} bits per byte (training batch)")
            next_line += REPORT_EVERY
    model.zero_grad(set_to_none=True)
    return steps


def sample(
    text: torch.Tensor, batch: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of `text`: inputs and next bytes, both int64 [batch, length]."""
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def bits_per_byte(
    forward: Callable[[torch.Tensor], torch.Tensor], text: torch.Tensor, length: int, windows: int
) -> float:
    """Mean bits per byte over `windows` evenly spaced windows of `text`, one window a call."""
    starts = torch.linspace(0, len(text) - length - 1, windows).long()
    total = 0.0
    with torch.inference_mode():
        for start in starts.tolist():
            window = text[start : start + length + 1].long()
            total += F.cross_entropy(forward(window[None, :-1])[0], window[1:]).item()
    return total / windows / math.log(2)


def _optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    inner: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inner if parameter.dim() == 2 and "blocks." in name else outer).append(parameter)
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
