"""Quantisation-aware training: float model -> prepare -> train -> `ternc.quantize` packs it.

Importing this package does no work: every name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ternc.train.callbacks import TrainingHooks, hf_callback
    from ternc.train.config import (
        Distillation,
        Hadamard,
        Momentum,
        Optimization,
        Regularization,
        TrainConfig,
    )
    from ternc.train.distill import Distiller
    from ternc.train.linear import QATLinear
    from ternc.train.log import tensorboard
    from ternc.train.preparation import finish, prepare, set_schedule, training_report
    from ternc.train.presets import PRESETS, preset
    from ternc.train.schedule import Schedule, Stage
    from ternc.train.site import Site, final_quantizers, sites
    from ternc.train.subln import insert_subln
    from ternc.train.trainer import Trainer

_HOME = {
    "Distillation": "ternc.train.config",
    "Distiller": "ternc.train.distill",
    "Hadamard": "ternc.train.config",
    "Momentum": "ternc.train.config",
    "Optimization": "ternc.train.config",
    "PRESETS": "ternc.train.presets",
    "QATLinear": "ternc.train.linear",
    "Regularization": "ternc.train.config",
    "Schedule": "ternc.train.schedule",
    "Site": "ternc.train.site",
    "Stage": "ternc.train.schedule",
    "TrainConfig": "ternc.train.config",
    "Trainer": "ternc.train.trainer",
    "TrainingHooks": "ternc.train.callbacks",
    "final_quantizers": "ternc.train.site",
    "finish": "ternc.train.preparation",
    "hf_callback": "ternc.train.callbacks",
    "insert_subln": "ternc.train.subln",
    "prepare": "ternc.train.preparation",
    "preset": "ternc.train.presets",
    "set_schedule": "ternc.train.preparation",
    "sites": "ternc.train.site",
    "tensorboard": "ternc.train.log",
    "training_report": "ternc.train.preparation",
}

__all__ = [
    "PRESETS",
    "Distillation",
    "Distiller",
    "Hadamard",
    "Momentum",
    "Optimization",
    "QATLinear",
    "Regularization",
    "Schedule",
    "Site",
    "Stage",
    "TrainConfig",
    "Trainer",
    "TrainingHooks",
    "final_quantizers",
    "finish",
    "hf_callback",
    "insert_subln",
    "prepare",
    "preset",
    "set_schedule",
    "sites",
    "tensorboard",
    "training_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ternc.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
