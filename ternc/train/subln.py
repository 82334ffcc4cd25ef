"""insert_subln(model): an RMSNorm in front of output projections, for models made from scratch.

    out_proj, down_proj -> Sequential-like: x -> RMSNorm(x) -> the projection      (SubLN)

Not for a trained network: the insertion changes what it computes.
"""

from __future__ import annotations

import fnmatch

import torch
from torch import nn

from ternc.train.config import OUTPUT_PROJECTIONS


def insert_subln(model: nn.Module, names: tuple[str, ...] = OUTPUT_PROJECTIONS) -> list[str]:
    """Puts an RMSNorm before every linear whose module path matches; returns the paths.

    The norm runs as a forward pre-hook on a submodule of the linear, `subln`, so that paths, keys
    of weights and classes stay what they are.
    """
    changed = []
    for path, module in list(model.named_modules()):
        leaf = f".{path.rpartition('.')[2]}"
        fits = any(fnmatch.fnmatchcase(path, n) or fnmatch.fnmatchcase(leaf, n) for n in names)
        if isinstance(module, nn.Linear) and fits and not hasattr(module, "subln"):
            device, dtype = module.weight.device, module.weight.dtype
            module.subln = nn.RMSNorm(module.in_features, device=device, dtype=dtype)
            module.register_forward_pre_hook(_normalize)
            changed.append(path)
    return changed


def _normalize(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (module.get_submodule("subln")(args[0]), *args[1:])
