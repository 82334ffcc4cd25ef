"""Quantised model, float model, batches -> KL divergence and agreement of the likeliest token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import call, counted_rows, evaluating
from ternc.calibration.distance import kl_divergence
from ternc.errors import InputError
from ternc.eval.outputs import logits_of


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close a model's predictions are to the float model's, on the mean over tokens."""

    kl: float
    """KL(float || model) in nats."""
    top1: float
    """Share of tokens with the same likeliest next token."""
    tokens: int


@torch.no_grad()
def compare_logits(model: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> Agreement:
    """Runs both models on every batch; padding that a batch names (`attention_mask`) is left out.

    Args:
        batches: a tensor, a tuple of arguments or a mapping of keyword arguments each.

    Raises:
        InputError: there is no batch, or a model returns no logits.
    """
    kl = same = 0.0
    tokens = 0
    with evaluating(reference), evaluating(model):
        for batch in batches:
            found, wanted = (
                counted_rows(batch, logits_of(call(each, batch))) for each in (model, reference)
            )
            kl += float(kl_divergence(found, wanted).sum(dtype=torch.float64))
            same += float((found.argmax(-1) == wanted.argmax(-1)).sum())
            tokens += len(found)
    if not tokens:
        raise InputError("there is no batch to compare the models on")
    return Agreement(kl / tokens, same / tokens, tokens)
