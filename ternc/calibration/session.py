"""`Session`: the calibration of one call of `quantize`, from its arguments to the tuned model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ternc.calibration.allocate import allocate
from ternc.calibration.attention import Expanded, expand_attention, settle_attention
from ternc.calibration.batches import materialised
from ternc.calibration.calibrator import Calibrator, Layer
from ternc.calibration.distance import Loss, default_loss
from ternc.calibration.reconstruct import Reconstruction, Window, reconstruct
from ternc.calibration.resume import Store, fingerprint
from ternc.calibration.tune import Tuning, tune
from ternc.config import Config
from ternc.errors import ConfigError
from ternc.reporting import Row


@dataclasses.dataclass
class Session:
    """What `quantize` was asked to do with calibration data."""

    config: Config
    batches: list[Any]
    loss: Loss
    tuning: Tuning | None
    reconstruction: Reconstruction | None
    resume: str | os.PathLike[str] | None
    progress: bool | None
    expanded: list[Expanded] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls,
        config: Config,
        batches: Iterable[Any] | None,
        loss: Loss | None,
        tuning: Tuning | None,
        reconstruction: Reconstruction | None,
        resume: str | os.PathLike[str] | None,
        progress: bool | None,
    ) -> Session | None:
        """None without calibration data.

        Raises:
            ConfigError: a setting was given that needs calibration data.
            InputError: the data are empty or hold no tensors.
        """
        if reconstruction is not None and not config.tie_scales and config.planes != 1:
            raise ConfigError(
                "reconstruction trains codes of one step a group: with tie_scales=False give "
                "planes=1, or leave it out"
            )
        if batches is not None:
            found = materialised(batches)
            return cls(
                config, found, loss or default_loss, tuning, reconstruction, resume, progress
            )
        given = {
            "loss": loss, "tuning": tuning, "reconstruction": reconstruction, "resume": resume
        }  # fmt: skip
        if asked := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{asked[0]} needs calibration data: give calibration=batches")
        return None

    def refuse_folded(self, rotated: Mapping[str, str]) -> None:
        """Raises ConfigError where blocks were rotated offline that would be compared with others.

        Args:
            rotated: layers whose inputs arrive rotated.
        """
        if rotated and self.reconstruction is not None and self.reconstruction.window is not None:
            raise ConfigError(
                f"reconstruction with window={self.reconstruction.window} compares blocks with the "
                "float model's, and rotations were folded into these; give window=None, or no "
                "example_inputs"
            )

    def enter(self, model: nn.Module) -> nn.Module:
        """The model with its attention modules split into projections; in place."""
        model, self.expanded = expand_attention(model, self.config)
        return model

    def calibrator(
        self, model: nn.Module, layers: Mapping[str, Layer], rotated: Collection[str]
    ) -> Calibrator:
        """What fits these layers of the model, plane counts allocated first if asked for.

        Args:
            rotated: layers whose inputs are rotated already, offline.
        """
        store = None
        if self.resume is not None:
            run = fingerprint(model, self.config, self.batches, self.loss)
            store = Store(self.resume, run)
        planes: dict[str, int] = {}
        if self.config.bits_budget is not None:
            planes = (store.read_planes(layers) if store else None) or allocate(
                model, layers, self.batches, self.config, self.loss, self.progress
            )
            if store:
                store.write_planes(planes)
        return Calibrator(model, layers, self.batches, self.config, planes, store, rotated)

    def leave(self, model: nn.Module) -> nn.Module:
        """Undoes `enter` where nothing was packed; in place."""
        return settle_attention(model, self.expanded)

    @property
    def needs_teacher(self) -> str | None:
        """Name of a setting that needs the float model beside the quantised one."""
        given = {"tuning": self.tuning, "reconstruction": self.reconstruction}
        return next((name for name, value in given.items() if value is not None), None)

    def train(self, model: nn.Module, teacher: nn.Module, rows: list[Row]) -> None:
        """Blocks against the float model's, then scales, norms and biases; says so in the rows."""
        if self.reconstruction is not None:
            windows = reconstruct(
                model, teacher, self.batches, self.loss, self.reconstruction, self.progress
            )
            said = _reconstructed(windows)
            for row in rows:
                if row.action == "rewritten":
                    row.reason += said.get(row.name, "; not reconstructed")
        if self.tuning is None:
            return
        before, after = tune(model, teacher, self.batches, self.loss, self.tuning, self.progress)
        change = f"held-out loss {before:.3g} -> {after:.3g}"
        for row in rows:
            if row.action == "rewritten" and after < before:
                row.reason += f"; scales tuned after these errors were measured, {change}"
            elif row.action == "rewritten":
                row.reason += f"; tuning did not help and was undone, {change}"


def _reconstructed(windows: list[Window]) -> dict[str, str]:
    """Layer -> what its report row says; of the last window that it was in."""
    said = {}
    for window in windows:
        change = f"held-out error {window.before:.3g} -> {window.after:.3g}"
        if window.after < window.before:
            text = f"; codes reconstructed after these errors were measured, {change}"
        else:
            text = f"; reconstruction did not help and was undone, {change}"
        said.update(dict.fromkeys(window.layers, text))
    return said
