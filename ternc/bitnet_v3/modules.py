"""The five techniques as modules with the page's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ternc.bitnet_v3.core import hadamard_transform
from ternc.config import Config
from ternc.formats.blend import TERNARY, blended, values_by_bits
from ternc.formats.rotation import Rotation
from ternc.runtime import ops
from ternc.train.config import Distillation, Hadamard, Momentum, Regularization, TrainConfig
from ternc.train.distill import feature_distance, kl_divergence, logit_gradient_distance
from ternc.train.gradients import alignment
from ternc.train.linear import QATLinear, SiteSettings
from ternc.train.momentum import MomentumTransform
from ternc.train.preparation import prepare
from ternc.train.quantizers import ternary
from ternc.train.regularize import Penalty
from ternc.train.schedule import BlendState, Schedule
from ternc.train.task import logits_of

__all__ = [
    "AdaptiveHadamardTransform",
    "EnhancedHBitLinear",
    "GradientAwareKnowledgeDistillation",
    "MomentumTransform",
    "MultiStageProgressiveQuantizer",
    "Penalty",
    "convert_to_bitnet_v3",
    "create_bitlinear_layer",
    "replace_linear_with_bitlinear",
]

PAGE_STAGES = (
    {"start_epoch": 1, "end_epoch": 20, "bits": 8},
    {"start_epoch": 21, "end_epoch": 40, "bits": 4},
    {"start_epoch": 41, "end_epoch": 55, "bits": 2},
    {"start_epoch": 56, "end_epoch": 70, "bits": 1.58},
)


class EnhancedHBitLinear(QATLinear):
    """A linear with a Hadamard transform of its input and weights that follow a schedule."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        adaptive_hadamard: bool = True,
        progressive_quantization: bool = True,
        *,
        learnable_scale: bool = True,
        learnable_shift: bool = True,
        activation_bits: int | None = 8,
        stages: Any = PAGE_STAGES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        config = Config(planes=1, group_size=None, activation_bits=activation_bits)
        schedule = Schedule(stages=stages) if progressive_quantization else None
        settings = SiteSettings(
            planes=1,
            group_size=0,
            activation_bits=config.op_activation_bits,
            formats=schedule.formats if schedule else (TERNARY,),
            rotation=Rotation.of(in_features, config.seed) if adaptive_hadamard else None,
            learn_scale=adaptive_hadamard and learnable_scale,
            learn_shift=adaptive_hadamard and learnable_shift,
        )
        weight = nn.Parameter(made.weight.detach())
        super().__init__(weight, made.bias, settings, config=config)
        self.schedule = schedule
        self.set_epoch(0)

    def set_epoch(self, epoch: float) -> None:
        """Moves the quantiser to an epoch of the schedule."""
        if self.schedule is not None:
            self.set_schedule(self.schedule.at(epoch))


class MultiStageProgressiveQuantizer(nn.Module):
    """w [N, K] -> the blend of quantisers of the current epoch, gradient straight through."""

    state: torch.Tensor

    def __init__(
        self,
        stages: Any = PAGE_STAGES,
        stage_epochs: Sequence[float] | None = None,
        temperature_schedule: str = "linear",
        mode: str = "normalised",
    ) -> None:
        super().__init__()
        ops.register()
        self.schedule = Schedule(
            stages=stages,
            stage_epochs=stage_epochs,
            temperature=temperature_schedule,  # type: ignore[arg-type]
            mode=mode,  # type: ignore[arg-type]
        )
        self.register_buffer("state", torch.zeros(3))
        self.set_epoch(0)

    def set_epoch(self, epoch: float) -> BlendState:
        """Moves to an epoch; returns the two bit-widths and the blend."""
        new = self.schedule.at(epoch)
        with torch.no_grad():
            self.state.copy_(torch.tensor([new.source, new.target, new.blend]))
        return new

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        given = w.detach()
        with torch.no_grad():
            final = ternary(given, 1, 0, "fit").dequantize().to(w.dtype)
            values = blended(values_by_bits(given, self.schedule.formats, final), self.state)
        return values + (w - given)


class AdaptiveHadamardTransform(nn.Module):
    """x [..., size] -> scale * (H x) + shift; an orthonormal transform where both are fresh."""

    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        size: int,
        learnable_params: bool = True,
        learnable_scale: bool | None = None,
        learnable_shift: bool | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        wanted = {
            "scale": (learnable_params if learnable_scale is None else learnable_scale, 1.0),
            "shift": (learnable_params if learnable_shift is None else learnable_shift, 0.0),
        }
        for name, (learnable, value) in wanted.items():
            made = nn.Parameter(torch.full((size,), value)) if learnable else None
            self.register_parameter(name, made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = hadamard_transform(x)
        if self.scale is not None:
            y = y * self.scale
        return y if self.shift is None else y + self.shift


class GradientAwareKnowledgeDistillation(nn.Module):
    """alpha KL + beta gradients + gamma features, a scalar with gradient.

    Outputs are logits (or model outputs); features and gradients are tensors, sequences or mappings
    of them. Gradients need their graph (`create_graph=True`) to be learnt from; without them the
    beta term is the difference of d CE / d logits, which needs none.
    """

    def __init__(
        self, alpha: float = 0.7, beta: float = 0.2, gamma: float = 0.1, temperature: float = 4.0
    ) -> None:
        super().__init__()
        self.weights = Distillation(alpha, beta, gamma, temperature=temperature)

    def forward(
        self,
        student_outputs: Any,
        teacher_outputs: Any,
        student_features: Any = None,
        teacher_features: Any = None,
        student_gradients: Any = None,
        teacher_gradients: Any = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss; `attention_mask` [..., T] names the valid tokens."""
        weights = self.weights
        student = logits_of(student_outputs).flatten(0, -2)
        teacher = logits_of(teacher_outputs).detach().flatten(0, -2)
        valid = torch.ones(len(student), dtype=torch.bool, device=student.device)
        if attention_mask is not None:
            valid = attention_mask.reshape(-1).bool()
        loss = weights.alpha * kl_divergence(student, teacher, valid, weights.temperature)
        if student_gradients is not None and teacher_gradients is not None:
            pairs = _named(student_gradients), _named(teacher_gradients)
            names = list(pairs[0])
            term = alignment([pairs[0][n] for n in names], [pairs[1][n].detach() for n in names])
        else:
            term = logit_gradient_distance(student, teacher, valid)
        loss = loss + weights.beta * term
        if student_features is not None and teacher_features is not None:
            distance = feature_distance(_named(student_features), _named(teacher_features))
            loss = loss + weights.gamma * distance
        return loss


def convert_to_bitnet_v3(
    model: nn.Module, enable_all_features: bool = True, inplace: bool = False
) -> nn.Module:
    """`model` with trainable ternary layers; at the start it computes what it did before.

    Args:
        enable_all_features: the page's stages, the Hadamard transform, distillation (with the
            teacher that the trainer is given), regularisation; else ternary from the first step on.
    """
    config = all_features() if enable_all_features else TrainConfig(weights=_ROWS)
    return prepare(model, config, inplace=inplace)


def all_features() -> TrainConfig:
    """The five techniques with the page's numbers, each in its sound form."""
    return TrainConfig(
        weights=_ROWS,
        schedule=Schedule(stages=PAGE_STAGES),
        hadamard=Hadamard(),
        distillation=Distillation(0.7, 0.2, 0.1, temperature=4.0),
        regularization=Regularization(strength=0.1),
        momentum=Momentum(momentum=0.9, power=0.5),
    )


def replace_linear_with_bitlinear(model: nn.Module, inplace: bool = True) -> nn.Module:
    """`model` with its linears as trainable ternary layers, without a schedule or transform."""
    return prepare(model, TrainConfig(weights=_ROWS), inplace=inplace)


def create_bitlinear_layer(
    in_features: int, out_features: int, bias: bool = False, **options: Any
) -> EnhancedHBitLinear:
    """An `EnhancedHBitLinear`."""
    return EnhancedHBitLinear(in_features, out_features, bias, **options)


_ROWS = Config(planes=1, group_size=None)


def _named(values: Any) -> dict[str, torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return {"0": values}
    if isinstance(values, Mapping):
        return dict(values)
    return {str(index): value for index, value in enumerate(values)}
