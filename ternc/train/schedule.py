"""Training progress -> which two quantisers are blended, and how far: multi-stage progressive
quantisation (MPQ).

    W_t = (1 - m) Q_from(W) + m Q_to(W),   m = M(p), p in [0, 1] the progress of the stage's ramp

M is a normalised sigmoid, (s(b(p)) - s(b(0))) / (s(b(1)) - s(b(0))), so M(0) = 0 and M(1) = 1
exactly. `mode="literal"` keeps s(b(p)) itself with b from 0 to 10: every stage then starts half-way
to its quantiser and never reaches it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ternc.errors import ConfigError
from ternc.formats.blend import FLOAT, TERNARY, WEIGHT_BITS

TEMPERATURE = 10.0
"""The sigmoid's argument spans this much in a stage."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: from the bits of the stage before to these bits."""

    bits: float
    length: float
    """In the unit of the schedule."""
    ramp: float = 0.5
    """Share of the stage in which the blend runs from 0 to 1; the rest trains the pure quantiser.
    0 switches at once.
    """


@dataclasses.dataclass(frozen=True)
class BlendState:
    """Two quantisers and a blend, as written into every site."""

    source: float
    target: float
    blend: float


def write_state(tensor: torch.Tensor, state: BlendState) -> None:
    """Writes a state into its tensor, fp32 [3], in place."""
    with torch.no_grad():
        values = torch.tensor([state.source, state.target, state.blend], dtype=tensor.dtype)
        tensor.copy_(values, non_blocking=True)


def describe_state(tensor: torch.Tensor) -> str:
    """A state in words, `1.58` or `8 -> 4 (0.31)`. Waits for the device."""
    source, target, blend = (round(value, 4) for value in tensor.tolist())
    return f"{target:g}" if blend == 1 else f"{source:g} -> {target:g} ({blend:g})"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Stages of bit-widths; what stands before the first stage is floating point.

    `stages` takes `Stage`s, mappings with "bits" and "epochs" (a length) or "start_epoch" and
    "end_epoch" (both included, the first epoch is 1), or bare bit-widths with `stage_epochs`.

    Raises:
        ConfigError: bits that no quantiser has, lengths that are not positive, epochs with gaps.
    """

    stages: Any = (Stage(TERNARY, 1.0, 0.0),)
    stage_epochs: Sequence[float] | None = None
    unit: Literal["step", "epoch", "fraction"] = "epoch"
    temperature: Literal["linear", "cosine"] = "linear"
    mode: Literal["normalised", "literal"] = "normalised"
    bits: tuple[float, ...] = WEIGHT_BITS
    """Bit-widths allowed here: those of weights or those of activations."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("unit", ("step", "epoch", "fraction")),
            ("temperature", ("linear", "cosine")),
            ("mode", ("normalised", "literal")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        object.__setattr__(self, "stages", parse_stages(self.stages, self.stage_epochs))
        object.__setattr__(self, "stage_epochs", None)
        for stage in self.stages:
            if stage.bits not in self.bits:
                raise ConfigError(f"bits={stage.bits:g} is not one of {self.bits}")
            if not stage.length > 0 or not 0 <= stage.ramp <= 1:
                raise ConfigError(
                    f"stage of {stage.bits:g} bits: length={stage.length!r} must be positive and "
                    f"ramp={stage.ramp!r} between 0 and 1"
                )
        if self.unit == "fraction" and sum(s.length for s in self.stages) > 1 + 1e-9:
            raise ConfigError("the stages of a schedule in fractions are longer than 1 together")

    @property
    def formats(self) -> tuple[float, ...]:
        """Every bit-width that training meets, the starting point included, in order of use."""
        first = self.stages[0]
        bits = [] if first.ramp == 0 and self.mode == "normalised" else [FLOAT]
        for stage in self.stages:
            if stage.bits not in bits:
                bits.append(stage.bits)
        return tuple(bits)

    @property
    def length(self) -> float:
        """End of the last stage, in the unit of the schedule."""
        return sum(stage.length for stage in self.stages)

    @property
    def final(self) -> BlendState:
        """The pure quantiser of the last stage: what evaluation and packing use."""
        return BlendState(self.stages[-1].bits, self.stages[-1].bits, 1.0)

    def at(self, progress: float) -> BlendState:
        """The state at `progress`, in the unit of the schedule; after the end, the last stage's."""
        start, source = 0.0, FLOAT
        for stage in self.stages:
            last = stage is self.stages[-1]
            if progress < start + stage.length or last:
                ramp = stage.length * (1.0 if self.mode == "literal" else stage.ramp)
                p = 1.0 if ramp == 0 else min(max((progress - start) / ramp, 0.0), 1.0)
                return self._blended(source, stage.bits, p)
            start, source = start + stage.length, stage.bits
        raise AssertionError("a schedule has a stage")

    def _blended(self, source: float, target: float, p: float) -> BlendState:
        blend = blend_at(p, self.temperature, self.mode)
        if blend == 1.0 or source == target:
            return BlendState(target, target, 1.0)
        return BlendState(source, target, blend)


def blend_at(p: float, temperature: str = "linear", mode: str = "normalised") -> float:
    """M(p) for the progress p in [0, 1] of a ramp."""
    if mode == "literal":
        return _sigmoid(_argument(p, temperature))
    if p in (0.0, 1.0):
        return p
    low, high = _sigmoid(-TEMPERATURE / 2), _sigmoid(TEMPERATURE / 2)
    return (_sigmoid(_argument(p, temperature) - TEMPERATURE / 2) - low) / (high - low)


def _argument(p: float, temperature: str) -> float:
    """0 to TEMPERATURE: linearly, or as half a cosine wave."""
    if temperature == "linear":
        return TEMPERATURE * p
    return TEMPERATURE / 2 * (1 + math.cos(math.pi * (1 - p)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def parse_stages(stages: Any, stage_epochs: Sequence[float] | None = None) -> tuple[Stage, ...]:
    """The three spellings of stages -> `Stage`s.

    Raises:
        ConfigError: an empty list, unknown keys, or epochs that do not follow each other.
    """
    stages = list(stages)
    if not stages:
        raise ConfigError("stages is empty: a schedule has at least one stage")
    if stage_epochs is not None:
        if len(stage_epochs) != len(stages):
            raise ConfigError(
                f"stage_epochs has {len(stage_epochs)} entries for {len(stages)} stages"
            )
        return tuple(Stage(_bits(b), float(n)) for b, n in zip(stages, stage_epochs, strict=True))
    parsed: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Stage):
            parsed.append(dataclasses.replace(stage, bits=_bits(stage.bits)))
        elif isinstance(stage, Mapping):
            parsed.append(_from_mapping(stage, sum(s.length for s in parsed)))
        else:
            raise ConfigError(
                f"stage {stage!r} is neither a Stage nor a mapping; bare bit-widths need "
                "stage_epochs"
            )
    return tuple(parsed)


def _from_mapping(stage: Mapping[str, Any], start: float) -> Stage:
    known = {"bits", "epochs", "start_epoch", "end_epoch", "ramp"}
    if "bits" not in stage or set(stage) - known:
        raise ConfigError(f"stage {dict(stage)!r}: the keys are 'bits' and others of {known}")
    ramp = float(stage.get("ramp", Stage.ramp))
    if "epochs" in stage:
        return Stage(_bits(stage["bits"]), float(stage["epochs"]), ramp)
    if "start_epoch" not in stage or "end_epoch" not in stage:
        raise ConfigError(f"stage {dict(stage)!r} has neither 'epochs' nor start and end epochs")
    if stage["start_epoch"] != start + 1:
        raise ConfigError(
            f"stage {dict(stage)!r} starts at epoch {stage['start_epoch']}; the stages before it "
            f"end with epoch {start:g}"
        )
    return Stage(_bits(stage["bits"]), float(stage["end_epoch"]) - start, ramp)


def _bits(bits: float) -> float:
    """16 and more are floating point; everything between 1 and 2 is ternary."""
    bits = float(bits)
    if bits >= FLOAT:
        return FLOAT
    return TERNARY if 1 < bits < 2 else bits
