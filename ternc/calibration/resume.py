"""`Store`: fitted layers kept in a folder, so that an interrupted run goes on where it stopped.

run.json                what was being quantised, by digest, and by what loss planes were
                            allocated: another run is refused
    planes.json             plane counts by layer, where they were allocated
<digest>.safetensors    the decisions of one group of layers, written whole or not at all
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.calibration import batches as calibration
from ternc.calibration.identity import identity
from ternc.config import CODE_MAX, Config
from ternc.errors import CheckpointError
from ternc.formats.quantized import Quantized
from ternc.formats.rotation import Rotation
from ternc.site import Decision

RUN = "run.json"
PLANES = "planes.json"


class Store:
    """A folder of decisions of one run."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        """Opens the folder, or makes it.

        Raises:
            CheckpointError: it holds another run: another model, configuration or calibration.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / RUN
        wanted = json.loads(json.dumps(fingerprint))
        if not path.exists():
            _write_whole(path, (json.dumps(wanted, indent=1) + "\n").encode())
        try:
            seen = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        differing = [key for key in wanted if seen.get(key) != wanted[key]]
        if differing:
            raise CheckpointError(
                f"{self._folder} holds a run with other {', '.join(differing)}; give resume= "
                "another folder, or delete this one"
            )

    def write(self, decisions: Mapping[str, Decision]) -> None:
        """Keeps the decisions of layers that share their input."""
        from safetensors.torch import save

        tensors, entries = {}, {}
        for name, decision in decisions.items():
            held = _tensors(decision)
            tensors.update({f"{name}/{key}": value for key, value in held.items()})
            entries[name] = _numbers(decision)
        data = save(tensors, {"decisions": json.dumps(entries)})
        _write_whole(self._path(list(decisions)), data)

    def read(self, names: Sequence[str], device: torch.device) -> dict[str, Decision] | None:
        """The decisions of these layers, or None where they are not there yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(names)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                entries = json.loads(file.metadata()["decisions"])
                tensors = {key: file.get_tensor(key).to(device) for key in list(file.keys())}
            return {name: _decision(name, entries[name], tensors) for name in names}
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; delete it") from error

    def write_planes(self, planes: Mapping[str, int]) -> None:
        """Keeps the plane counts that were allocated."""
        _write_whole(self._folder / PLANES, json.dumps(dict(planes), indent=1).encode())

    def read_planes(self, names: Collection[str]) -> dict[str, int] | None:
        """The plane counts that were allocated to these layers, or None where they were not yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._folder / PLANES
        if not path.exists():
            return None
        try:
            planes = json.loads(path.read_text(encoding="utf-8"))
            whole = set(planes) == set(names) and all(planes[name] in CODE_MAX for name in names)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; delete it") from error
        if not whole:
            raise CheckpointError(f"{path} is damaged: not 1 to 3 planes a layer; delete it")
        return planes

    def _path(self, names: Sequence[str]) -> Path:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        return self._folder / f"{digest[:16]}.safetensors"


def fingerprint(
    model: nn.Module, config: Config, batches: Sequence[Any], loss: Callable[..., Any]
) -> dict[str, Any]:
    """What makes two runs the same: weights, configuration, calibration data, versions.

    Args:
        loss: counts where it chooses planes, under a budget of bits.
    """
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return {
        "model": found.hexdigest(),
        "configuration": config.to_dict(),
        "calibration": calibration.digest(batches),
        "torch": torch.__version__,
        "loss": None if config.bits_budget is None else identity(loss),
    }


def _tensors(decision: Decision) -> dict[str, torch.Tensor]:
    held = {"bias": decision.bias}
    if (quantized := decision.quantized) is not None:
        held |= {name: getattr(quantized, name) for name in ("codes", "scale", "multiplier")}
    return {name: t.detach().cpu().contiguous() for name, t in held.items() if t is not None}


def _numbers(decision: Decision) -> dict[str, Any]:
    quantized = decision.quantized
    return {
        "reason": decision.reason,
        "error": decision.error,
        "output_error": decision.output_error,
        "rotation": decision.rotation and dataclasses.asdict(decision.rotation),
        "quantized": quantized
        and {
            "group_size": quantized.group_size,
            "planes": quantized.planes,
            "exact": quantized.exact,
        },
    }


def _decision(name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Decision:
    quantized, rotation = entry.pop("quantized"), entry.pop("rotation")
    return Decision(
        quantized=quantized
        and Quantized(
            codes=tensors[f"{name}/codes"],
            scale=tensors[f"{name}/scale"],
            multiplier=tensors.get(f"{name}/multiplier"),
            **quantized,
        ),
        rotation=rotation and Rotation(**rotation),
        bias=tensors.get(f"{name}/bias"),
        **entry,
    )


def _write_whole(path: Path, data: bytes) -> None:
    """Under another name first: an interruption leaves no half of a file."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
