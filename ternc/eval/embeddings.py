"""Quantised encoder, float encoder, batches -> cosine of embeddings, neighbours that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ternc.calibration.batches import call, evaluating
from ternc.errors import InputError
from ternc.eval.outputs import hidden_of

Pooling = Callable[[Any, Any], torch.Tensor]
"""(output of the model, batch) -> embeddings [B, D]."""


@dataclasses.dataclass(frozen=True)
class EmbeddingScore:
    """How close a model's embeddings are to the float model's."""

    cosine: float
    """Mean cosine of corresponding embeddings."""
    overlap: float
    """Mean share of the nearest neighbours, by cosine, that both models agree on."""
    neighbours: int
    count: int
    """Embeddings compared."""


def mean_pooled(output: Any, batch: Any) -> torch.Tensor:
    """Mean of the hidden states over the tokens, padding left out, of length one; [B, D]."""
    hidden = hidden_of(output)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return F.normalize(hidden.mean(1), dim=-1)
    weight = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@torch.no_grad()
def compare_embeddings(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    pooling: Pooling = mean_pooled,
    neighbours: int = 10,
) -> EmbeddingScore:
    """Runs both models on every batch.

    Raises:
        InputError: there are not more embeddings than neighbours.
    """
    found, wanted = [], []
    with evaluating(reference), evaluating(model):
        for batch in batches:
            found.append(F.normalize(pooling(call(model, batch), batch).float(), dim=-1))
            wanted.append(F.normalize(pooling(call(reference, batch), batch).float(), dim=-1))
    count = sum(len(part) for part in found)
    if count <= neighbours:
        raise InputError(
            f"{count} embeddings have no {neighbours} neighbours each; give more, or fewer "
            "neighbours"
        )
    ours, theirs = torch.cat(found), torch.cat(wanted)
    nearest = [_nearest(embeddings, neighbours) for embeddings in (ours, theirs)]
    shared = (nearest[0][:, :, None] == nearest[1][:, None, :]).sum((1, 2)).float()
    return EmbeddingScore(
        cosine=float((ours * theirs).sum(-1).mean()),
        overlap=float(shared.mean()) / neighbours,
        neighbours=neighbours,
        count=count,
    )


def _nearest(embeddings: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Indices [M, neighbours] of the nearest other rows of unit rows [M, D]."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).topk(neighbours).indices
