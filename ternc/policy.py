"""What the configuration says about a layer by its name, and what a way in cannot obey."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence

from ternc.config import DEFAULT_EXCLUDE, GATES, Config
from ternc.errors import ConfigError
from ternc.formats.fit import REFINE_ROUNDS


def excluded(name: str, config: Config, shape: Sequence[int] = ()) -> str | None:
    """Why the weight at module path `name` stays floating point, or None where it does not.

    `shape` is (N, K) of the weight, where it is known: see `GATES`.

    `include` overrides `exclude` and `int8`; a glob matches the whole path, `*` also across dots.
    What `marked_int8` holds of is asked there first: here it only is no ternary weight.
    """
    if included(name, config):
        return None
    if glob := _first_match(name, config.int8):
        return f"asked for as int8 (int8={glob!r}), which this use of the weight cannot be"
    if glob := _first_match(name, _excluding(config, shape)):
        return f"excluded by name ({glob!r})"
    return None


def _excluding(config: Config, shape: Sequence[int]) -> tuple[str, ...]:
    """The globs of `exclude`; for a weight that is no router, the default ones less `GATES`."""
    default = config.exclude[: len(DEFAULT_EXCLUDE)] == DEFAULT_EXCLUDE
    if not default or len(shape) != 2 or shape[0] < shape[1]:
        return config.exclude
    return tuple(glob for glob in config.exclude if glob not in GATES)


def marked_int8(name: str, config: Config) -> bool:
    """True where the configuration asks for int8 storage of the weight at this path."""
    return bool(_first_match(name, config.int8)) and not included(name, config)


def included(name: str, config: Config) -> bool:
    """True where `include` names this path: an embedding is packed on request only."""
    return bool(_first_match(name, config.include))


def unmatched(config: Config, names: Collection[str]) -> list[str]:
    """What a report says of the globs that match none of a model's `names`; not of default ones."""
    found = []
    for field in ("exclude", "include", "int8"):
        for glob in getattr(config, field):
            if glob in DEFAULT_EXCLUDE or _matches_any(glob, names):
                continue
            nearer = (f"{glob}.*", f"*.{glob}", f"*{glob}*")
            better = next((other for other in nearer if _matches_any(other, names)), None)
            instead = f"; {better!r} would match some" if better else ""
            found.append(
                f"{field}={glob!r} matches no layer: a glob is for the whole module path{instead}"
            )
    return found


def _matches_any(glob: str, names: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in names)


def refine_rounds(config: Config) -> int:
    """Argument `refine` of `ternc::fit`: 0 for method="rtn", else alternating least squares."""
    return 0 if config.method == "rtn" else REFINE_ROUNDS


def refuse_live(config: Config) -> None:
    """Refuses settings that belong to `ternc.quantize`, where the backend packs live weights.

    Raises:
        ConfigError: names the setting and what to use instead.
    """
    _refuse(config, OFFLINE_ONLY, "belongs to ternc.quantize")


def refuse_offline(config: Config, calibrated: bool) -> None:
    """Refuses settings that `ternc.quantize` could not obey, so that none is ever ignored.

    Args:
        calibrated: calibration data were given.

    Raises:
        ConfigError: names the setting and what to use instead.
    """
    if not calibrated:
        _refuse(config, _CALIBRATED_ONLY, "needs calibration data: give calibration=batches")
    if config.bits_budget is not None and config.planes != "auto":
        raise ConfigError(
            f"bits_budget={config.bits_budget!r} stands beside planes={config.planes!r}; it "
            "chooses the planes, so use planes='auto'"
        )


_BUDGET = (lambda value: value is None, "error_budget, or a fixed number of planes")

OFFLINE_ONLY = {
    "method": (lambda value: value in ("auto", "rtn"), "method='auto'"),
    "bits_budget": _BUDGET,
    "tie_scales": (lambda value: value, "tie_scales=True"),
}
"""Field -> (what the backend takes, what to use instead)."""

_CALIBRATED_ONLY = {
    "method": (lambda value: value != "gptq", "method='als'"),
    "bits_budget": _BUDGET,
}


def _refuse(config: Config, rules: Mapping[str, tuple[Callable, str]], why: str) -> None:
    for field, (holds, instead) in rules.items():
        if not holds(getattr(config, field)):
            raise ConfigError(f"{field}={getattr(config, field)!r} {why}, or use {instead}")


def _first_match(name: str, globs: tuple[str, ...]) -> str | None:
    return next((glob for glob in globs if fnmatch.fnmatchcase(name, glob)), None)
