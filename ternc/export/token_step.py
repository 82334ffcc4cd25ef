"""Language model of transformers -> a module of one token, with a static cache of its own.

model, places --TokenStep--> module(ids, position) -> logits: what `compile_step` takes
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ternc.errors import MissingExtraError, UnsupportedModelError


class TokenStep(nn.Module):
    """logits = module(ids, position), both int64 [B, T]; keys and values of past tokens are kept.

    Args:
        model: a decoder whose forward takes position_ids and past_key_values.
        places: tokens that the cache has room for.
        batch: B.

    Raises:
        UnsupportedModelError: a model of another kind.
    """

    def __init__(self, model: Any, places: int, batch: int = 1) -> None:
        try:
            from transformers import StaticCache
        except ImportError as error:
            raise MissingExtraError("transformers", "hf", "a static cache") from error
        super().__init__()
        known = inspect.signature(model.forward).parameters
        for name in ("position_ids", "past_key_values"):
            if name not in known:
                raise UnsupportedModelError(f"{type(model).__name__}.forward takes no {name}")
        self.model = model
        self.cache: Any = StaticCache(model.config, max_cache_len=places)
        first = torch.zeros(batch, 1, dtype=torch.int64, device=next(model.parameters()).device)
        with torch.no_grad():
            self(first, first)  # makes the cache's tensors
        self.reset()

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=ids, position_ids=position, past_key_values=self.cache)
        logits: torch.Tensor = output.logits
        return logits

    def reset(self) -> None:
        """Forgets all tokens; the cache's tensors stay where they are."""
        self.cache.reset()
