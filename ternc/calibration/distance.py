"""How far the outputs of a quantised model are from the float model's: KL of logits, or cosine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from ternc.calibration.batches import counted_rows
from ternc.errors import InputError

Loss = Callable[[Any, Any, Any], torch.Tensor]
"""(output of the quantised model, output of the float model, batch) -> scalar."""


def default_loss(output: Any, target: Any, batch: Any) -> torch.Tensor:
    """KL(float || quantised) per token where the output has logits, else one minus the cosine.

    Without `logits` the first floating-point tensor of the output is compared, row by row; padding
    that the batch names is left out.

    Raises:
        InputError: the output holds no floating-point tensor.
    """
    found, wanted = _logits(output), _logits(target)
    if found is not None and wanted is not None:
        return kl_divergence(counted_rows_of(batch, found), counted_rows_of(batch, wanted)).mean()
    found, wanted = (_first_tensor(value) for value in (output, target))
    rows, goals = counted_rows_of(batch, found), counted_rows_of(batch, wanted)
    return (1 - F.cosine_similarity(rows.float(), goals.float(), dim=-1)).mean()


def kl_divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(softmax(target) || softmax(logits)) in nats of every row, [M, V] -> fp32 [M]."""
    log_q = F.log_softmax(logits.float(), dim=-1)
    log_p = F.log_softmax(target.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def counted_rows_of(batch: Any, x: torch.Tensor) -> torch.Tensor:
    """`counted_rows`, but the gradient stays."""
    mask = counted_rows(batch, torch.arange(x.shape[:-1].numel()).reshape(*x.shape[:-1], 1))
    return x.reshape(-1, x.shape[-1])[mask.flatten().to(x.device)]


def _logits(output: Any) -> torch.Tensor | None:
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    return found


def _first_tensor(output: Any) -> torch.Tensor:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise InputError(
        f"the model returns a {type(output).__name__} without a floating-point tensor; give loss="
    )
