"""A decoder block in the spellings of norms and activations that models have."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "relu2": lambda x: torch.relu(x) ** 2,
}


class RMSNorm(nn.Module):
    """The usual spelling in decoders: statistics in fp32, rounded before the gain."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class ShiftedNorm(nn.Module):
    """Gain 1 + w, one rounding at the end."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 8)

    def forward(self, x):
        y = x.float() / torch.sqrt((x.float() * x.float()).mean(dim=-1, keepdim=True) + 1e-5)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Block(nn.Module):
    """Pre-norm decoder block with grouped-query attention."""

    def __init__(self, norm=RMSNorm, activation=F.silu, bias=False):
        super().__init__()
        self.norm1, self.norm2 = norm(64), norm(64)
        self.q = nn.Linear(64, 64, bias=bias)
        self.k = nn.Linear(64, 32, bias=bias)
        self.v = nn.Linear(64, 32, bias=False)
        self.o = nn.Linear(64, 64, bias=bias)
        self.w1, self.up = nn.Linear(64, 160, bias=False), nn.Linear(64, 160, bias=False)
        self.down = nn.Linear(160, 64, bias=bias)
        self.activation = activation

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(self.activation(self.w1(h)) * self.up(h))
