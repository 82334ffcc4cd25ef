"""Errors for users: one class per mistake. Each says which module, what was seen, what was wanted,
what to do.
"""

from __future__ import annotations


class TerncError(Exception):
    """Root of every error that ternc raises on purpose."""


class ConfigError(TerncError, ValueError):
    """A field of `Config` or an option of the backend has a value that is not allowed."""


class UnknownOptionError(ConfigError):
    """An option key that neither `Config` nor the backend knows."""

    def __init__(self, unknown: list[str], valid: list[str]) -> None:
        names = ", ".join(repr(key) for key in unknown)
        super().__init__(f"unknown option {names}; valid options are {', '.join(sorted(valid))}")


class WeightShapeError(TerncError, ValueError):
    """A weight whose shape a format or a kernel cannot hold."""


class NotTernaryError(TerncError, ValueError):
    """A weight that was asked to be lowered exactly but does not hold {-s, 0, +s}."""


class CheckpointError(TerncError, ValueError):
    """A saved folder that is damaged, truncated, or does not fit the model it is loaded into."""


class UnsupportedModelError(TerncError):
    """A model that an operation cannot take at all (a single layer is a report row instead)."""


class MissingExtraError(TerncError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: pip install 'ternc[{extra}]'",
            name=package,
        )


class KernelError(TerncError, RuntimeError):
    """A kernel was asked for something that no build on this machine provides."""


class DifferentiationError(TerncError, RuntimeError):
    """A gradient was asked of an op that has none."""


class InputError(TerncError, ValueError):
    """An input of a module whose shape, dtype or layout the module does not take."""


class BlendedWeightError(TerncError, RuntimeError):
    """A layer was asked to be packed while its schedule still blends two quantisers."""


class TrainingError(TerncError, RuntimeError):
    """A training run that cannot go on as it was asked to."""
