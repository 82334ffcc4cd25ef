"""`Manifest`: what `ternc.json` says, read without trusting it.

Every field is checked for its type; a name that no field has, or garbage, is a CheckpointError.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ternc.config import LARGEST_CODE, Config
from ternc.errors import CheckpointError, TerncError
from ternc.reporting import Row

FORMAT = "ternc"
FORMAT_VERSION = 1

_DTYPES = {str(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclasses.dataclass(frozen=True)
class PackedModule:
    """One packed layer, without its tensors and without a byte layout."""

    shape: tuple[int, int]
    planes: int
    group_size: int
    weight_dtype: str
    transposed: bool
    bias: bool
    exact: bool
    config: Config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the float weight that was replaced."""
        return _DTYPES[self.weight_dtype]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `ternc.json`."""

    weights_sha256: str
    """Of the weights file: says that both files are whole and of one save."""
    model_class: str
    """Of the root, for messages; never imported."""
    builder: str | None
    """Class of transformers that builds the model from config.json, or None."""
    config: Config
    modules: dict[str, PackedModule]
    """By module path; a shared module under each of its paths."""
    attention: list[str]
    """Paths of packed attention modules."""
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """dtype and shape of every tensor of the weights file."""
    aliases: dict[str, str]
    """Tied names -> the stored one."""
    buffers: list[str]
    """Names of buffers that no state_dict has."""
    rows: list[Row]

    def to_json(self) -> str:
        """The text of the file."""
        configs = list(dict.fromkeys(module.config for module in self.modules.values()))
        modules = {
            path: {
                **dataclasses.asdict(module),
                "shape": list(module.shape),
                "config": configs.index(module.config),
            }
            for path, module in self.modules.items()
        }
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "weights_sha256": self.weights_sha256,
            "model_class": self.model_class,
            "builder": self.builder,
            "config": self.config.to_dict(),
            "configs": [config.to_dict() for config in configs],
            "modules": modules,
            "attention": self.attention,
            "tensors": {
                name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()
            },
            "aliases": self.aliases,
            "buffers": self.buffers,
            "rows": [row.to_dict() for row in self.rows],
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads and checks the file.

        Raises:
            CheckpointError: it is missing, no JSON, of another format version, or inconsistent.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: not a folder that ternc.save wrote")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return _manifest(values)
        except (ValueError, RecursionError, LookupError, TypeError, TerncError) as error:
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path} is damaged: {reason}") from error


def _manifest(values: Any) -> Manifest:
    _is(values, dict, "the file")
    if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"format {values.get('format')!r} version {values.get('format_version')!r}; this "
            f"version reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    configs = [
        Config.from_dict(_is(c, dict, "configs")) for c in _is(values["configs"], list, "configs")
    ]
    tensors = {
        name: (_is(entry[0], str, name), _shape(entry[1], name))
        for name, entry in _is(values["tensors"], dict, "tensors").items()
    }
    aliases = _is(values["aliases"], dict, "aliases")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise CheckpointError(f"aliases: {alias!r} -> {name!r} names no tensor of its own")
    builder = values["builder"]
    return Manifest(
        weights_sha256=_is(values["weights_sha256"], str, "weights_sha256"),
        model_class=_is(values["model_class"], str, "model_class"),
        builder=None if builder is None else _is(builder, str, "builder"),
        config=Config.from_dict(_is(values["config"], dict, "config")),
        modules={
            path: _packed_module(_is(entry, dict, path), path, configs)
            for path, entry in _is(values["modules"], dict, "modules").items()
        },
        attention=_names(values, "attention"),
        tensors=tensors,
        aliases=aliases,
        buffers=_names(values, "buffers"),
        rows=[_row(_is(row, dict, "rows")) for row in _is(values["rows"], list, "rows")],
    )


def _names(values: dict[str, Any], field: str) -> list[str]:
    return [_is(name, str, field) for name in _is(values[field], list, field)]


def _packed_module(entry: dict[str, Any], path: str, configs: list[Config]) -> PackedModule:
    index = _is(entry.pop("config"), int, path)
    if not 0 <= index < len(configs):
        raise CheckpointError(f"modules: {path!r} has config {index} of {len(configs)}")
    shape = _shape(entry.pop("shape"), path)
    if len(shape) != 2:
        raise CheckpointError(f"modules: {path!r} has shape {list(shape)}")
    module = PackedModule(shape=shape, config=configs[index], **entry)
    for name in ("transposed", "bias", "exact"):
        _is(entry[name], bool, f"{path}.{name}")
    _is(module.group_size, int, f"{path}.group_size")
    known = module.weight_dtype in _DTYPES and module.planes in LARGEST_CODE
    if not known or module.group_size < 0:
        raise CheckpointError(f"modules: {path!r} has impossible values {entry}")
    return module


def _row(values: dict[str, Any]) -> Row:
    row = Row(**{**values, "shape": _shape(values["shape"], "rows")})
    for name in ("name", "pattern", "action", "reason", "format"):
        _is(getattr(row, name), str, f"rows.{name}")
    for name in ("bytes_before", "bytes_after", "bytes_at_rest"):
        _is(getattr(row, name), int, f"rows.{name}")
    for name in ("bits_per_weight", "weight_error", "output_error"):
        if (value := getattr(row, name)) is not None:
            _is(value, (int, float), f"rows.{name}")
    for name in ("kernel", "shared_with"):
        if (value := getattr(row, name)) is not None:
            _is(value, str, f"rows.{name}")
    return row


def _shape(value: Any, name: str) -> tuple[int, ...]:
    sizes = _is(value, list, name)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise CheckpointError(f"{name}: {sizes!r:.80} is not a shape")
    return tuple(sizes)


def _is(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{name}: {value!r:.80} has the wrong type")
    return value
