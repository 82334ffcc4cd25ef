"""The names of the `bitnet_v3` package over ternc: `import ternc.bitnet_v3 as bitnet_v3`.

Thin: layers, schedules, losses and the trainer are those of `ternc.train`.
"""

from __future__ import annotations

from ternc.bitnet_v3 import core, models, modules, training, utils
from ternc.bitnet_v3.core import hadamard_transform
from ternc.bitnet_v3.models import BitNetV3ForCausalLM, BitNetV3Model, create_model
from ternc.bitnet_v3.modules import (
    AdaptiveHadamardTransform,
    EnhancedHBitLinear,
    GradientAwareKnowledgeDistillation,
    MultiStageProgressiveQuantizer,
    convert_to_bitnet_v3,
    create_bitlinear_layer,
    replace_linear_with_bitlinear,
)
from ternc.bitnet_v3.training import (
    BitNetV3Trainer,
    MPQScheduler,
    create_mpq_schedule,
    create_trainer,
)
from ternc.bitnet_v3.utils import (
    BitNetV3Config,
    compute_efficiency_metrics,
    compute_perplexity,
    evaluate_downstream_tasks,
)

__all__ = [
    "AdaptiveHadamardTransform",
    "BitNetV3Config",
    "BitNetV3ForCausalLM",
    "BitNetV3Model",
    "BitNetV3Trainer",
    "EnhancedHBitLinear",
    "GradientAwareKnowledgeDistillation",
    "MPQScheduler",
    "MultiStageProgressiveQuantizer",
    "compute_efficiency_metrics",
    "compute_perplexity",
    "convert_to_bitnet_v3",
    "core",
    "create_bitlinear_layer",
    "create_model",
    "create_mpq_schedule",
    "create_trainer",
    "evaluate_downstream_tasks",
    "hadamard_transform",
    "models",
    "modules",
    "replace_linear_with_bitlinear",
    "training",
    "utils",
]
