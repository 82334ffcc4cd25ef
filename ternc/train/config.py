"""`TrainConfig`: how a model is trained towards ternary weights, in small frozen parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ternc.config import Config, checked_globs
from ternc.errors import ConfigError, UnknownOptionError
from ternc.formats.blend import ACTIVATION_BITS, TERNARY
from ternc.train.schedule import Schedule, Stage

OUTPUT_PROJECTIONS = (
    "*o_proj",
    "*out_proj",
    "*c_proj",
    "*out_lin",
    "*.out",
    "*.o",
    "*.wo",
    "*att*.dense",
    "*output.dense",
    "*down_proj",
    "*.down",
    "*.w2",
    "*fc2",
    "*lin2",
    "*linear2",
    "*ffn_output",
    "*4h_to_h",
)
"""Projections behind attention and behind an activation function, by the names that they have in
common architectures: where BitNet v2 (arXiv 2504.18415) puts its transform.
"""


@dataclasses.dataclass(frozen=True)
class Hadamard:
    """Adaptive block Hadamard transform of layer inputs: y = Q(W H^T diag(scale)) H x + W shift."""

    layers: tuple[str, ...] = OUTPUT_PROJECTIONS
    """Name globs of the layers that get it."""
    learn_scale: bool = True
    """One factor a column, folded into the weight before it is quantised; starts at 1."""
    learn_shift: bool = True
    """One zero point a column, carried by the bias (W shift); starts at 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checked_globs("layers", self.layers))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Gradient-aware knowledge distillation: alpha KL + beta gradients + gamma features."""

    alpha: float = 1.0
    """Weight of T**2 KL(teacher || student), a mean over valid tokens."""
    beta: float = 0.0
    """Weight of the gradient alignment."""
    gamma: float = 0.0
    """Weight of the feature alignment."""
    task: float = 1.0
    """Weight of the task's own loss."""
    temperature: float = 1.0
    gradient: Literal["logit", "hvp", "exact"] = "logit"
    """What is aligned: d CE / d logits (free), or d CE / d W by a finite difference of two more
    backward passes, or by double backward (eager only, for tests).
    """
    feature_layers: tuple[str, ...] | int = 4
    """Sites whose outputs are compared: names, or how many, evenly spaced."""
    balance: bool = False
    """Scale each extra term to `balance_target` times the gradient norm of the task's loss."""
    balance_target: float = 0.3
    cache: bool = False
    """Keep the teacher's logits of every sequence in memory: for data that is seen several times,
    in any order and in the same widths.
    """
    ignore_index: int = -100

    def __post_init__(self) -> None:
        _choice("gradient", self.gradient, ("logit", "hvp", "exact"))
        for name in ("alpha", "beta", "gamma", "task"):
            _not_negative(name, getattr(self, name))
        _positive("temperature", self.temperature)
        _positive("balance_target", self.balance_target)


@dataclasses.dataclass(frozen=True)
class Regularization:
    """Dynamic regularisation: lambda(t) sum_i w_i ||W_i - Q(W_i)||^2 / n_i, Q(W) held constant."""

    strength: float = 0.1
    """Lambda. 0.1 is hardly felt: for a matrix of a quarter million weights its gradient is less
    than a ten-thousandth of the task's, and with 1e4 some hundredths.
    """
    schedule: Literal["ramp", "constant", "decay"] = "ramp"
    """"ramp" rises from 0 over the last `share` of training; "decay" is strength * rate**epoch."""
    share: float = 0.3
    rate: float = 0.95
    sensitivity: bool = True
    """Weight layers by an average of their task gradient's norm; else all alike."""
    momentum: float = 0.9
    """Of that average."""

    def __post_init__(self) -> None:
        _choice("schedule", self.schedule, ("ramp", "constant", "decay"))
        _not_negative("strength", self.strength)
        for name in ("share", "rate", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Straight-through estimator with momentum: g -> ||m|| sign(m) |m|^power / || |m|^power ||."""

    momentum: float = 0.9
    power: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum!r} is not in [0, 1)")
        _positive("power", self.power)


@dataclasses.dataclass(frozen=True)
class Optimization:
    """Optimiser and learning rate over a run."""

    name: Literal["adamw", "muon"] = "adamw"
    """"muon" trains matrices of quantised layers with Muon, everything else with AdamW."""
    learning_rate: float = 1e-3
    hadamard_learning_rate: float | None = None
    """Of the transform's scales and shifts; None = the same."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """Of matrices; biases, norms, scales and shifts have none."""
    schedule: Literal["two_phase", "cosine", "wsd", "constant"] = "two_phase"
    """"two_phase": linear decay to `phase_two` of the peak at half time, then to 0 from there, and
    no weight decay in the second half (BitNet b1.58). "wsd": flat, then down over `warm_down`.
    """
    phase_two: float = 2 / 3
    warm_up: float = 0.02
    """Share of the steps."""
    warm_down: float = 0.2
    clip: float | None = 1.0
    """Largest gradient norm; None = no clipping."""

    def __post_init__(self) -> None:
        _choice("name", self.name, ("adamw", "muon"))
        _choice("schedule", self.schedule, ("two_phase", "cosine", "wsd", "constant"))
        _positive("learning_rate", self.learning_rate)
        _not_negative("weight_decay", self.weight_decay)
        object.__setattr__(self, "betas", tuple(self.betas))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything about a training run but the data. Every field changes behaviour.

    Raises:
        ConfigError: values that do not go together; the message names them.
    """

    weights: Config = dataclasses.field(default_factory=lambda: Config(planes=1))
    """What each weight is at the end: planes, groups, activation bits, names left out."""
    scale: Literal["fit", "learnt", "absmean"] = "fit"
    """Scales of least squares, refitted in every step; those of the start, learnt from there on
    (LSQ; without a schedule); or the mean magnitude of BitNet b1.58 (one plane).
    """
    schedule: Schedule | None = None
    """Bits of the weights; None = the final quantiser from the first step on."""
    activation_schedule: Schedule | None = None
    """Bits of the activations; None = `weights.activation_bits` from the first step on."""
    hadamard: Hadamard | None = None
    dead_zone: float = 0.0
    """Weight lambda of the bias sum_j lambda w_j over the columns j whose trit is 0 (Tequila, arXiv
    2509.23809); it becomes part of the bias when the layer is packed.
    """
    distillation: Distillation | None = None
    regularization: Regularization | None = None
    momentum: Momentum | None = None
    optimization: Optimization = dataclasses.field(default_factory=Optimization)
    accumulate: int = 1
    """Batches of the loader in one optimiser step."""
    autocast: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        _choice("scale", self.scale, ("fit", "learnt", "absmean"))
        _choice("autocast", self.autocast, ("bfloat16", None))
        if self.scale == "absmean" and self.weights.planes != 1:
            raise ConfigError(
                f"scale='absmean' has one plane, not planes={self.weights.planes!r}; "
                "use planes=1 or scale='fit'"
            )
        if self.scale == "learnt" and self.schedule is not None:
            raise ConfigError(
                "scale='learnt' starts at the scales of the trained weight and has no schedule; "
                "leave schedule out or use scale='fit'"
            )
        _not_negative("dead_zone", self.dead_zone)
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ConfigError(f"accumulate={self.accumulate!r} is not a positive integer")
        if self.schedule is not None and self.schedule.stages[-1].bits != TERNARY:
            raise ConfigError(
                f"the last stage of the weights has {self.schedule.stages[-1].bits:g} bits; only a "
                f"schedule that ends with {TERNARY} bits can be packed"
            )
        if (acts := self.activation_schedule) is not None:
            last, wanted = acts.stages[-1].bits, float(self.weights.activation_bits or 16)
            if any(stage.bits not in ACTIVATION_BITS for stage in acts.stages) or last != wanted:
                raise ConfigError(
                    f"activation_schedule has stages of {[s.bits for s in acts.stages]} bits; "
                    f"allowed are {ACTIVATION_BITS}, ending with activation_bits={wanted:g}"
                )

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values in some fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return {**dataclasses.asdict(self), "weights": self.weights.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Raises UnknownOptionError for a key that is no field, ConfigError for a bad value."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [key for key in values if key not in names]:
            raise UnknownOptionError(unknown, names)
        made: dict[str, Any] = dict(values)
        made["weights"] = Config.from_dict(made.get("weights", {"planes": 1}))
        for name, part in _PARTS.items():
            if isinstance(made.get(name), Mapping):
                made[name] = part(**_tuples(made[name]))
        return cls(**made)


def as_train_config(config: TrainConfig | Config | None) -> TrainConfig:
    """A plain `Config` is what the weights become; the rest is left at its defaults."""
    if isinstance(config, Config):
        return TrainConfig(weights=config)
    return config or TrainConfig()


def _schedule(**values: Any) -> Schedule:
    values["stages"] = [Stage(**stage) for stage in values["stages"]]
    return Schedule(**values)


_PARTS: dict[str, Any] = {
    "schedule": _schedule,
    "activation_schedule": _schedule,
    "hadamard": Hadamard,
    "distillation": Distillation,
    "regularization": Regularization,
    "momentum": Momentum,
    "optimization": Optimization,
}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) and key != "stages" else value
        for key, value in values.items()
    }


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name}={value!r} is negative")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}={value!r} is not positive")
