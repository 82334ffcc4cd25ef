"""A batch of a loader -> what the model is called with, and the targets its logits are scored on.

mapping            model(**batch without "labels"); labels are those of the same positions, as
                   transformers has them: logits at t are scored on the label at t + 1, or at t
                   where the model fills gaps, names tokens or has an encoder (`predicts_next`)
(inputs, targets)  model(inputs); logits and targets at the same positions
tensor [B, T]      next-token prediction: inputs are all but the last, targets all but the first
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ternc.errors import InputError

Loss = Callable[[Any, Any], torch.Tensor]
"""(output of the model, batch) -> scalar."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One batch, taken apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: torch.Tensor | None
    shifted: bool = False
    """Logits at t belong to the target at t + 1."""


def predicts_next(model: Any) -> bool:
    """Whether the logits of a position belong to the label of the next, in batches that are
    mappings: what transformers says of the model's loss decides; one that says nothing is causal.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def example_of(batch: Any, next_token: bool = True) -> Example:
    """Takes a batch apart.

    Args:
        next_token: `predicts_next` of the model.

    Raises:
        InputError: it is none of the three forms.
    """
    if isinstance(batch, Mapping):
        kwargs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch.get("labels")
        shifted = next_token and labels is not None and labels.dim() > 1
        return Example((), kwargs, labels, shifted)
    if isinstance(batch, torch.Tensor):
        if batch.dim() == 2 and batch.dtype in (torch.int64, torch.int32, torch.uint8):
            batch = batch.long()
            return Example((batch[:, :-1],), {}, batch[:, 1:])
        return Example((batch,), {}, None)
    if isinstance(batch, Sequence) and len(batch) == 2:
        return Example((batch[0],), {}, batch[1])
    raise InputError(
        f"a batch is a {type(batch).__name__}; taken are mappings, (inputs, targets) and integer "
        "tensors [batch, length]"
    )


def call(model: Callable[..., Any], example: Example) -> Any:
    """The output of a model for an example."""
    return model(*example.args, **example.kwargs)


def logits_of(output: Any) -> torch.Tensor:
    """The logits in whatever a model returned: a tensor, `.logits`, ["logits"], or the first."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    return output[0]


def scored(
    logits: torch.Tensor, example: Example, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [n, V], targets int64 [n] and valid bool [n] of the positions that have a target."""
    targets = example.targets
    if targets is None:
        flat = logits.flatten(0, -2)
        every = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        return flat, torch.full((len(flat),), ignore_index, device=flat.device), every
    if example.shifted:
        logits, targets = logits[:, :-1], targets[:, 1:]
    targets = targets.reshape(-1)
    return logits.reshape(len(targets), -1), targets, targets != ignore_index


def cross_entropy(
    output: Any, batch: Any, ignore_index: int = -100, next_token: bool = True
) -> torch.Tensor:
    """Mean over valid tokens, in fp32.

    Raises:
        InputError: the batch has no targets.
    """
    example = example_of(batch, next_token)
    if example.targets is None:
        raise InputError(
            "the batch has no targets: give a mapping with labels, (inputs, targets), token ids "
            "[batch, length], or a loss of your own"
        )
    logits, targets, _ = scored(logits_of(output), example, ignore_index)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
