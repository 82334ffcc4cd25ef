"""Model -> optimisers, and the factors of learning rate and weight decay over a run.

matrices (sites and other 2-D weights)      learning rate, weight decay
scales and shifts of the transform          their own learning rate, no decay
biases, norms, embeddings                   learning rate, no decay
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ternc.errors import ConfigError
from ternc.train.config import Optimization
from ternc.train.linear import QATLinear
from ternc.train.site import sites, unwrap


def make_optimizers(
    model: nn.Module, config: Optimization, extra: nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """Optimisers of every Parameter that requires grad, those of `extra` included.

    Raises:
        ConfigError: Muon is asked for and this torch has none.
    """
    inner = {id(site.weight): site.weight for site in sites(model) if site.weight.requires_grad}
    turned, decayed, plain = _split(unwrap(model), set(inner))
    if extra is not None:
        decayed += [p for p in extra.parameters() if p.requires_grad]
    rate = config.learning_rate
    transform_rate = config.hadamard_learning_rate
    decay = config.weight_decay
    matrices = list(inner.values())
    groups = [
        _group(decayed + ([] if config.name == "muon" else matrices), rate, decay),
        _group(turned, rate if transform_rate is None else transform_rate, 0.0),
        _group(plain, rate, 0.0),
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError("name='muon' needs torch.optim.Muon, which this torch has not")
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            )
            optimizers.append(muon)
    if groups:
        fused = _fits_fused(groups)
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"], group["peak_decay"] = group["lr"], group["weight_decay"]
    return optimizers


def _split(
    model: nn.Module, inner: set[int]
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Parameters beside the sites': of transforms, decayed matrices, and the rest."""
    of_transforms: set[int] = set()
    of_embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, QATLinear):
            scales = (module.hadamard_scale, module.hadamard_shift)
            of_transforms.update(id(p) for p in scales if p is not None)
        if isinstance(module, nn.Embedding):
            of_embeddings.add(id(module.weight))
    turned, decayed, plain = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad or id(parameter) in inner:
            continue
        if id(parameter) in of_transforms:
            turned.append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in of_embeddings:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    return turned, decayed, plain


def _fits_fused(groups: list[dict]) -> bool | None:
    """One kernel for all Parameters where they are plain CUDA tensors; else torch decides."""
    every = [parameter for group in groups for parameter in group["params"]]
    plain = all(p.is_cuda and not hasattr(p, "full_tensor") for p in every)
    return True if plain else None


def _group(params: list[nn.Parameter], rate: float, decay: float) -> dict:
    return {"params": params, "lr": rate, "weight_decay": decay}


def learning_rate_factor(config: Optimization, step: int, total: int) -> float:
    """Share of the peak at optimiser step `step` of `total`, counted from 0."""
    warm_up = max(1, round(config.warm_up * total))
    if step < warm_up:
        return (step + 1) / warm_up
    f = step / max(total, 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * f))
    if config.schedule == "wsd":
        return min(1.0, (1 - f) / config.warm_down) if config.warm_down else 1.0
    if f < 0.5:
        return 1 - (1 - config.phase_two) * 2 * f
    return config.phase_two * 2 * (1 - f)


def weight_decay_factor(config: Optimization, step: int, total: int) -> float:
    """1, and 0 in the second half of a two-phase run."""
    return 0.0 if config.schedule == "two_phase" and 2 * step >= total else 1.0


def set_rates(
    optimizers: list[torch.optim.Optimizer], config: Optimization, step: int, total: int
) -> float:
    """Writes learning rates and weight decays of a step; returns the factor of the first."""
    rate = learning_rate_factor(config, step, total)
    decay = weight_decay_factor(config, step, total)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
            group["weight_decay"] = group["peak_decay"] * decay
    return rate
