"""What the configuration says about a layer by its name, and what this version cannot do yet."""

from __future__ import annotations

import fnmatch

from ternc.config import Config
from ternc.errors import ConfigError
from ternc.formats.fit import REFINE_ROUNDS


def excluded(name: str, config: Config) -> str | None:
    """Why the weight at module path `name` stays floating point, or None where it does not.

    `include` overrides `exclude` and `int8`; a glob matches the whole path, `*` also across dots.
    """
    if _first_match(name, config.include):
        return None
    if glob := _first_match(name, config.int8):
        return f"int8 storage (int8={glob!r}) is not in this version: it stays floating point"
    if glob := _first_match(name, config.exclude):
        return f"excluded by name ({glob!r})"
    return None


def marked_int8(name: str, config: Config) -> bool:
    """True where the configuration asks for int8 storage of the weight at this path."""
    return bool(_first_match(name, config.int8)) and not _first_match(name, config.include)


def refine_rounds(config: Config) -> int:
    """Argument `refine` of `ternc::fit`: 0 for method="rtn", else alternating least squares."""
    return 0 if config.method == "rtn" else REFINE_ROUNDS


def refuse_unsupported(config: Config, calibrated: bool) -> None:
    """Refuses settings that no part of this version obeys, so that none is ever ignored.

    Args:
        calibrated: calibration data were given.

    Raises:
        ConfigError: names the setting and what to use instead.
    """
    if calibrated:
        raise ConfigError(
            "calibration data are not used by this version yet; leave calibration out"
        )
    for field, (holds, instead) in _NOT_YET.items():
        if not holds(getattr(config, field)):
            raise ConfigError(
                f"{field}={getattr(config, field)!r} is not in this version yet; use {instead}"
            )


_NOT_YET = {
    "rotation": (lambda value: value != "hadamard", "rotation='none'"),
    "method": (lambda value: value != "gptq", "method='als'"),
    "bits_budget": (lambda value: value is None, "error_budget, or a fixed number of planes"),
    "tie_scales": (lambda value: value, "tie_scales=True"),
}
"""Field -> (what this version takes, what to use instead)."""


def _first_match(name: str, globs: tuple[str, ...]) -> str | None:
    return next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), None)
