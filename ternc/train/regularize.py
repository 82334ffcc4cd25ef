"""Dynamic regularisation (DR-QAP): R = lambda(t) sum_i w_i ||W_i - Q(W_i)||^2 / n_i over the sites.

Q is the layer's own current quantiser, held constant, so that dR/dW = 2 lambda w (W - Q) / n. With
scales of least squares this is the true gradient (envelope theorem); it is added to `.grad` without
a graph, after the gradients of all processes are summed.
"""

from __future__ import annotations

import torch
from torch import nn

from ternc.train.config import Regularization, TrainConfig
from ternc.train.sharding import full, like
from ternc.train.site import Site


class Penalty(nn.Module):
    """The term's state: a running sensitivity of every site, in a buffer that is saved."""

    sensitivity: torch.Tensor

    def __init__(self, found: list[Site], config: Regularization) -> None:
        super().__init__()
        self.config = config
        device = found[0].weight.device if found else None
        self.register_buffer("sensitivity", torch.zeros(len(found), device=device))

    def strength(self, fraction: float, epoch: float) -> float:
        """lambda at a fraction of the run and an epoch."""
        config = self.config
        if config.schedule == "constant":
            return config.strength
        if config.schedule == "decay":
            return config.strength * config.rate**epoch
        start = 1 - config.share
        return config.strength * max(0.0, (fraction - start) / config.share if config.share else 0)

    @torch.no_grad()
    def observe(self, found: list[Site]) -> None:
        """Updates the sensitivities from the task's gradients, ||g|| / sqrt(n)."""
        if not self.config.sensitivity:
            return
        seen = torch.stack([_root_mean_square(site.weight.grad, site.weight) for site in found])
        share = torch.where(self.sensitivity.sum() > 0, self.config.momentum, 0.0)
        self.sensitivity.mul_(share).add_((1 - share) * seen)

    def weights(self) -> torch.Tensor:
        """w_i [sites], of sum 1."""
        total = self.sensitivity.sum()
        count = max(len(self.sensitivity), 1)
        alike = torch.full_like(self.sensitivity, 1 / count)
        return torch.where(total > 0, self.sensitivity / total.clamp(min=1e-30), alike)

    @torch.no_grad()
    def add_gradient(self, found: list[Site], strength: float) -> torch.Tensor:
        """Adds dR/dW to the gradient of every site; returns R."""
        total = torch.zeros((), device=self.sensitivity.device)
        if not strength:
            return total
        for site, weight in zip(found, self.weights(), strict=True):
            module = site.module
            difference = module.matrix() - module.values()
            total += strength * weight * difference.square().sum() / difference.numel()
            step = 2 * strength * weight / difference.numel() * difference
            if module.hadamard_scale is not None:
                step = step * full(module.hadamard_scale)
            if site.weight.grad is not None:
                step = step.t() if module.transposed else step
                site.weight.grad.add_(like(step, site.weight.grad))
        return total


def make_penalty(found: list[Site], config: TrainConfig) -> Penalty | None:
    """The penalty that a configuration asks for."""
    return None if config.regularization is None else Penalty(found, config.regularization)


def _root_mean_square(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return torch.zeros((), device=like.device)
    return full(gradient.float().square().mean()).sqrt()
