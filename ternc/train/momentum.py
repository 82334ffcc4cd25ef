"""Straight-through estimator with momentum (ESTE-M): g -> ||m|| f / ||f||, f = sign(m) |m|^p.

m is the bias-corrected average of the gradient of one site. Applied where gradients are final:
after accumulation and the sum over processes, before clipping. power=1 and momentum=0 leave every
gradient as it is, bit for bit. Costs 4 bytes a weight.
"""

from __future__ import annotations

import torch

from ternc.train.config import Momentum, TrainConfig
from ternc.train.sharding import full, like
from ternc.train.site import Site


class MomentumTransform:
    """The averages of all sites, by name; `state_dict` holds them."""

    def __init__(self, config: Momentum) -> None:
        self.config = config
        self.steps = 0
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def apply(self, found: list[Site]) -> None:
        """Replaces the gradient of every site, in place."""
        mu, power = self.config.momentum, self.config.power
        self.steps += 1
        for site in found:
            gradient = site.weight.grad
            if gradient is None:
                continue
            average = gradient.float()
            if mu:
                held = self.averages.setdefault(site.name, torch.zeros_like(average))
                held = self.averages[site.name] = like(full(held), average)
                held.mul_(mu).add_(average, alpha=1 - mu)
                average = held / (1 - mu**self.steps)
            if power != 1:
                shaped = average.sign() * average.abs().pow(power)
                average = shaped * (average.norm() / shaped.norm().clamp(min=1e-30))
            gradient.copy_(average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by site name, and the number of steps."""
        found = {name: full(average) for name, average in self.averages.items()}
        return {"steps": torch.tensor(self.steps), **found}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.steps = int(state["steps"])
        self.averages = {name: value.clone() for name, value in state.items() if name != "steps"}


def make_momentum(config: TrainConfig) -> MomentumTransform | None:
    """The transform that a configuration asks for."""
    return None if config.momentum is None else MomentumTransform(config.momentum)
