"""GPT-2's shape as plain modules: no configuration, no cache object, nothing but tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, BLOCKS, PLACES, WORDS = 768, 12, 12, 1024, 50257


class Block(nn.Module):
    """Attention over a static cache of `places` tokens, and an MLP."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        for name in ("keys", "values"):
            empty = torch.zeros(1, HEADS, places, WIDTH // HEADS, dtype=torch.float32)
            self.register_buffer(name, empty, persistent=False)

    def forward(self, x: torch.Tensor, position: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).split(WIDTH, -1)
        q, k, v = (part.view(1, 1, HEADS, -1).transpose(1, 2) for part in parts)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, seen)
        x = x + self.out(y.transpose(1, 2).reshape(1, 1, WIDTH))
        return x + self.down(F.gelu(self.up(self.second_norm(x)), approximate="tanh"))


class PlainDecoder(nn.Module):
    """ids int64 [1, 1], position int64 [1] -> logits [1, 1, WORDS]."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.blocks = nn.ModuleList(Block(places) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("order", torch.arange(places), persistent=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(position)
        seen = (self.order <= position)[None, None, None]
        for block in self.blocks:
            x = block(x, position, seen)
        return self.lm_head(self.norm(x))
