"""A weight and correlated inputs, on which compensation has something to gain."""

import torch


def correlated(rows, columns, tokens, seed=0):
    """(w [rows, columns] with heavy tails, x [tokens, columns] with one outlier column)."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.3 * torch.randn(columns, columns, generator=generator) + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, columns // 3] *= 10
    w = torch.randn(rows, columns, generator=generator)
    return 0.05 * w * (1 + w.abs()), x


def output_loss(w, quantized, x):
    """Mean squared output error, relative."""
    return float((x @ (w - quantized).T).square().sum() / (x @ w.T).square().sum())
