"""`Config`: what a network becomes. Frozen, checked on construction, saved with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ternc.errors import ConfigError, UnknownOptionError

MAX_MULTIPLIED_CODE = 127
"""Bound of multiplier * |code|: the product is an int8 weight."""

CODE_MAX = {1: 1, 2: 4, 3: 13}
"""Largest |code| of 1, 2, 3 tied trit planes: (3**planes - 1) / 2."""

INT8 = 8
"""Stands where a number of planes does: a weight held as int8 codes, bytes and not trits."""

LARGEST_CODE = {**CODE_MAX, INT8: 127}
"""Largest |code| of every kind of weight."""

MAX_IN_FEATURES = 131_072
"""Largest K: 131,072 * 127 * 127 is the last sum that fits int32."""

GATES = ("*.gate", "gate")
"""Names of routers of experts, and of gates of gated products: in the default `exclude` they mean
weights with fewer outputs than inputs, as routers have.
"""

DEFAULT_EXCLUDE = ("lm_head", "*.lm_head", "*embed*", "*router*", *GATES)


@dataclasses.dataclass(frozen=True)
class Config:
    """How weights and activations are quantised. Every field changes behaviour.

    Raises:
        ConfigError: a value is not allowed; the message names the field, the value and the choices.
    """

    planes: int | Literal["auto"] = "auto"
    """Trit planes per weight: 1, 2, 3, or "auto" (the fewest within `error_budget`)."""
    error_budget: float = 0.10
    """For "auto": relative weight error ||W - Q|| / ||W||, or output error when calibration is
    given.
    """
    bits_budget: float | None = None
    """For "auto" with calibration: mean bits per quantised weight, scales included."""
    group_size: int | Literal["tensor"] | None = 128
    """Input columns that share a multiplier; None = one scale per row, "tensor" = one per
    weight.
    """
    tie_scales: bool = True
    """Plane scales in ratio 9:3:1 (balanced ternary); False = free scales, one for every group and
    plane: kernels then read P planes as P times the columns. Without groups it changes nothing.
    """
    activation_bits: int | None = 8
    """Per-token integer activations: 8 or 4; None keeps them in floating point."""
    rotation: Literal["auto", "hadamard", "none"] = "auto"
    """Block Hadamard rotation of the inputs; "auto" is "none" without calibration data, else the
    better of the two. "hadamard" is folded into float weights where `example_inputs` show how.
    """
    method: Literal["auto", "rtn", "als", "gptq"] = "auto"
    """Fit of the codes; "auto" is "gptq" with calibration data, else "als"."""
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Name globs left in floating point; a wide `gate` of a gated product is not, by default."""
    include: tuple[str, ...] = ()
    """Name globs that override `exclude`."""
    int8: tuple[str, ...] = ()
    """Name globs (embeddings, heads) stored as int8 with a scale per row."""
    seed: int = 0
    """Seed of rotation signs and of search order."""

    def __post_init__(self) -> None:
        for name in ("exclude", "include", "int8"):
            object.__setattr__(self, name, checked_globs(name, getattr(self, name)))
        self._require("planes", (1, 2, 3, "auto"))
        self._require("activation_bits", (8, 4, None))
        self._require("rotation", ("auto", "hadamard", "none"))
        self._require("method", ("auto", "rtn", "als", "gptq"))
        if not _is_number(self.error_budget) or not 0.0 < self.error_budget < 1.0:
            raise ConfigError(f"error_budget={self.error_budget!r} is not between 0 and 1")
        bits = self.bits_budget
        if bits is not None and not (_is_number(bits) and 1.0 <= bits <= 16.0):
            raise ConfigError(f"bits_budget={self.bits_budget!r} is not between 1 and 16 bits")
        if self.group_size not in (None, "tensor"):
            size = self.group_size
            if not isinstance(size, int) or isinstance(size, bool) or size < 4 or size % 4:
                raise ConfigError(
                    f"group_size={size!r} is not a positive multiple of 4, None (row) or 'tensor'"
                )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed={self.seed!r} is not an int")
        if not isinstance(self.tie_scales, bool):
            raise ConfigError(f"tie_scales={self.tie_scales!r} is not True or False")

    def _require(self, name: str, choices: tuple[object, ...]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool | float) or value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{name}={value!r} is not one of {listed}")

    @property
    def fit_group(self) -> int:
        """Group argument of `ternc::fit`: columns, 0 = row, -1 = tensor."""
        if self.group_size == "tensor":
            return -1
        return self.group_size or 0

    @property
    def op_activation_bits(self) -> int:
        """Activation argument of `ternc::linear`: 8, 4, or 0 for floating point."""
        return self.activation_bits or 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Raises UnknownOptionError for a key that is no field, ConfigError for a bad value."""
        fields = field_names()
        if unknown := [key for key in values if key not in fields]:
            raise UnknownOptionError(unknown, fields)
        return cls(**values)


def checked_config(config: Config | None) -> Config:
    """`config`, or the default one.

    Raises:
        ConfigError: it is something else, such as a dict of fields.
    """
    if config is None or isinstance(config, Config):
        return config or Config()
    raise ConfigError(
        f"config is a {type(config).__name__}, not a ternc.Config: write "
        "ternc.Config(planes=2), or ternc.Config(**fields) where the fields are a dict"
    )


def checked_globs(name: str, globs: Any) -> tuple[str, ...]:
    """The value of a field that takes name globs. Raises ConfigError for a lone string."""
    if isinstance(globs, list | tuple) and all(isinstance(glob, str) for glob in globs):
        return tuple(globs)
    example = f"({globs!r},)" if isinstance(globs, str) else "('lm_head', '*embed*')"
    raise ConfigError(f"{name}={globs!r} is not a sequence of name globs: write {name}={example}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def field_names() -> list[str]:
    """Names of the fields of `Config`."""
    return [field.name for field in dataclasses.fields(Config)]
