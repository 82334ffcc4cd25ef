"""BitLinear in the spellings that people write: none of these names is known to ternc."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


def absmean(w):
    scale = w.abs().mean().clamp(min=1e-5)
    return (w / scale).round().clamp(-1, 1) * scale


def absmean_inplace(w):
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


def absmax_rows(w):
    scale = w.abs().amax(dim=1, keepdim=True).clamp(min=1e-5)
    return (w / scale).round().clamp(-1, 1) * scale


def per_group(w, size=32):
    grouped = w.view(w.shape[0], -1, size)
    scale = grouped.abs().mean(-1, keepdim=True)
    return ((grouped / scale).round().clamp(-1, 1) * scale).view_as(w)


def int8_tokens(x):
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


class Detach(nn.Linear):
    """absmean per tensor, detach trick, on weights and activations."""

    def forward(self, x):
        x = x + (int8_tokens(x) - x).detach()
        w = self.weight
        w = w + (absmean_inplace(w) - w).detach()
        return F.linear(x, w, self.bias)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return absmean(w)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Function(nn.Linear):
    """absmean per tensor through an autograd.Function."""

    def forward(self, x):
        return F.linear(x, _StraightThrough.apply(self.weight), self.bias)


class _Ternary(nn.Module):
    def forward(self, w):
        return w + (absmean(w) - w).detach()


def Parametrized(*args, **kwargs):
    """absmean per tensor as a parametrisation of nn.Linear."""
    linear = nn.Linear(*args, **kwargs)
    parametrize.register_parametrization(linear, "weight", _Ternary(), unsafe=True)
    return linear


class PerGroup(nn.Linear):
    """absmean of every 32 columns."""

    def forward(self, x):
        w = self.weight
        return x @ (w - (w - per_group(w)).detach()).t() + (0 if self.bias is None else self.bias)


class AbsmaxRows(nn.Linear):
    """absmax per row, no straight-through."""

    def forward(self, x):
        return F.linear(x, absmax_rows(self.weight), self.bias)


class ScaledAfter(nn.Module):
    """Stored trits, scale applied after the product."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        trits = torch.randint(-1, 2, (out_features, in_features)).float()
        self.register_buffer("trits", trits)
        self.scale = nn.Parameter(torch.rand(1))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        y = F.linear(x, self.trits) * self.scale
        return y if self.bias is None else y + self.bias


SPELLINGS = [Detach, Function, Parametrized, PerGroup, AbsmaxRows, ScaledAfter]
