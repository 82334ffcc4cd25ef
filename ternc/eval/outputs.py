"""What a model returned -> its logits or its embeddings, whatever it is wrapped in."""

from __future__ import annotations

from typing import Any

import torch

from ternc.errors import InputError


def logits_of(output: Any) -> torch.Tensor:
    """Logits [B, T, V]: `output.logits`, `output["logits"]`, the tensor, or the first of a tuple.

    Raises:
        InputError: none of these is a tensor of three dimensions.
    """
    found = _named(output, "logits")
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        raise InputError(
            f"the model returns {_described(output)}; logits [batch, tokens, vocabulary] are wanted"
        )
    return found


def hidden_of(output: Any) -> torch.Tensor:
    """Hidden states [B, T, D]: `last_hidden_state`, the tensor, or the first of a tuple.

    Raises:
        InputError: none of these is a tensor of three dimensions.
    """
    found = _named(output, "last_hidden_state")
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        raise InputError(
            f"the model returns {_described(output)}; hidden states [batch, tokens, width] are "
            "wanted"
        )
    return found


def _named(output: Any, name: str) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and name in output:
        return output[name]
    if hasattr(output, name):
        return getattr(output, name)
    return output[0] if isinstance(output, (tuple, list)) and output else None


def _described(output: Any) -> str:
    shape = f" {list(output.shape)}" if isinstance(output, torch.Tensor) else ""
    return f"a {type(output).__name__}{shape}"
