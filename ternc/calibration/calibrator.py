"""`Calibrator`: the name of a layer -> what it becomes, fitted to the inputs that it gets now.

Layers are asked for in the order in which the model runs them, and each is packed before the next
is asked for: activations come from the already quantised prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ternc.calibration.activations import NOT_CALLED, Activations
from ternc.calibration.batches import evaluating
from ternc.calibration.execution import record
from ternc.calibration.fit import SWEEPS, Metric, fit
from ternc.calibration.guard import Candidate, fell_back, judged
from ternc.calibration.moments import LARGEST, SplitMoments
from ternc.calibration.refit import corrected_bias
from ternc.calibration.resume import Store
from ternc.calibration.target import Target, target_of, transfer
from ternc.config import CODE_MAX, Config
from ternc.decision import fewest
from ternc.formats.detect import detect_ternary
from ternc.formats.fit import over_budget, refuse
from ternc.formats.quantized import Refusal, frobenius
from ternc.formats.rotation import Rotation
from ternc.modules.conversion import Spelling, float_weight
from ternc.site import Decision

ROTATION_PLANES = 2
"""Plane count at which rotated and unrotated fits are compared where planes="auto"."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear module that calibration may fit."""

    module: nn.Module
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module, spelling: Spelling) -> Layer:
        return cls(module, spelling.transposed)

    def weight(self) -> torch.Tensor:
        """The float weight [N, K], its parametrisations evaluated."""
        weight = float_weight(self.module)
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


class Calibrator:
    """Fits the layers of one model that is being converted."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        batches: Sequence[Any],
        config: Config,
        planes: Mapping[str, int],
        store: Store | None,
        rotated: Collection[str] = (),
    ) -> None:
        """Runs the float model once to see what it calls and when.

        Args:
            planes: plane counts decided before, by layer; `config.planes` for the others.
            store: where fitted layers are kept for a run that takes over after an interruption.
            rotated: layers whose inputs are rotated already, offline.
        """
        self._rotated = rotated
        self._model, self._layers = model, dict(layers)
        self._config, self._planes, self._store = config, planes, store
        modules = {name: layer.module for name, layer in layers.items()}
        with evaluating(model):
            execution = record(model, modules, batches[0])
            self._activations = Activations(model, batches, execution)
        self._group_of = {name: group for group in execution.groups for name in group}
        self._decided: dict[str, Decision | Refusal] = {}

    def order(self, names: Iterable[str]) -> list[str]:
        """The names in the order in which the model calls them; those it does not call last."""
        rank = {name: position for position, name in enumerate(self._group_of)}
        return sorted(names, key=lambda name: rank.get(name, len(rank)))

    def decide(self, name: str) -> Decision | Refusal:
        """What the layer becomes, or why the calibration data do not say.

        The layers that share its input are fitted with it, and answered for when they are asked
        for.
        """
        if name not in self._group_of:
            self._layers.pop(name, None)
            return NOT_CALLED
        if name not in self._decided:
            with evaluating(self._model):
                self._activations.arrive(self._layers[name].module)
            group = [n for n in self._group_of[name] if n in self._layers]
            self._decided.update(self._restored(group) or self._fitted(group))
        self._layers.pop(name, None)
        return self._decided.pop(name)

    def _restored(self, group: list[str]) -> dict[str, Decision] | None:
        device = self._layers[group[0]].weight().device
        return None if self._store is None else self._store.read(group, device)

    def _fitted(self, group: list[str]) -> dict[str, Decision | Refusal]:
        valued = {name: self._by_value(name) for name in group}
        decided = {name: found for name, found in valued.items() if found is not None}
        open_ = [name for name in group if name not in decided]
        if open_:
            with evaluating(self._model):
                layer = self._layers[open_[0]]
                moments = self._activations.moments(open_[0], layer.module)
            if isinstance(moments, Refusal):
                decided.update(dict.fromkeys(open_, moments))
            else:
                decided.update(self._fit_group(open_, moments))
        found = {name: each for name, each in decided.items() if isinstance(each, Decision)}
        if self._store is not None and len(found) == len(group):
            self._store.write(found)
        return decided

    def _by_value(self, name: str) -> Decision | Refusal | None:
        """The decision where the values of the weight make it alone, or rule these fits out."""
        w, size = self._layers[name].weight(), self._config.group_size
        found = detect_ternary(w, size if isinstance(size, int) else None)
        if not isinstance(found, Refusal):
            return Decision(found, "ternary by value: lowered exactly", 0.0, 0.0)
        if refusal := refuse(w, self._config):
            return Decision(None, refusal.reason)
        largest = float(w.abs().max())
        if 1 / LARGEST <= largest <= LARGEST:
            return None
        return Refusal(f"not fitted to data: squares of weights of {largest:.2g} leave fp32")

    def _fit_group(self, group: list[str], moments: SplitMoments) -> dict[str, Decision]:
        fits = _GroupFits(moments, self._config, group[0] in self._rotated)
        layers = {name: self._layers[name] for name in group}
        targets = {
            name: fits.target(layer.weight().float(), layer.bias is not None)
            for name, layer in layers.items()
        }
        goals = {
            name: Goal(target.weight, layers[name].bias is not None)
            for name, target in targets.items()
        }
        rotation = fits.choose_rotation(goals, {name: self._asked(name) for name in group})
        candidates = self._fitted_candidates(goals, fits, rotation)
        return {
            name: self._decision(name, targets[name], candidates[name], fits, rotation)
            for name in group
        }

    def _asked(self, name: str) -> int | Literal["auto"]:
        """Plane count of a layer as configured or allocated."""
        return self._planes.get(name, self._config.planes)

    def _fitted_candidates(
        self, goals: Mapping[str, Goal], fits: _GroupFits, rotation: Rotation | None
    ) -> dict[str, list[Candidate]]:
        """Candidates of the plane count asked for, or of the fewest planes within the budget."""
        found: dict[str, list[Candidate]] = {}
        for count in CODE_MAX:
            open_ = {
                name: goal
                for name, goal in goals.items()
                if self._asked(name) == count
                or (self._asked(name) == "auto" and not self._within(found.get(name)))
            }
            found.update(fits.candidates(open_, dict.fromkeys(open_, count), rotation))
        return found

    def _within(self, candidates: list[Candidate] | None) -> bool:
        return candidates is not None and _best(candidates).error <= self._config.error_budget

    def _decision(
        self,
        name: str,
        target: Target,
        candidates: list[Candidate],
        fits: _GroupFits,
        rotation: Rotation | None,
    ) -> Decision:
        layer, budget = self._layers[name], self._config.error_budget
        chosen = _best(candidates)
        count = chosen.quantized.planes
        if self._asked(name) != "auto":
            source = "by measured sensitivity" if name in self._planes else "as configured"
            reason = f"planes={count} {source}"
        elif self._within(candidates):
            reason = f"{fewest(count, budget)} on held-out data"
        else:
            refusal = over_budget(count, "held-out output error", chosen.error, budget)
            return Decision(None, refusal.reason, output_error=chosen.error)
        reason = f"{reason}; {chosen.method}{fell_back(chosen, candidates)}"
        bias = layer.bias
        return Decision(
            quantized=chosen.quantized,
            reason=f"{reason}{fits.left_out}",
            error=_relative(layer.weight().float(), target.weight - chosen.difference),
            output_error=chosen.error,
            rotation=rotation,
            bias=None if bias is None else fits.corrected(bias, target, chosen),
        )


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is fitted: a weight fp32 [N, K], and whether a bias takes up the mean of its error."""

    weight: torch.Tensor
    centred: bool


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.error)


def _relative(w: torch.Tensor, quantized: torch.Tensor) -> float:
    """||w - q|| / ||w||; 0 for an all-zero w."""
    return frobenius(w - quantized) / frobenius(w) if w.any() else 0.0


class _GroupFits:
    """Fits of layers that share their input: metrics and rotated moments are computed once."""

    def __init__(self, moments: SplitMoments, config: Config, rotated: bool) -> None:
        self._config = dataclasses.replace(config, rotation="none") if rotated else config
        self._moments = moments
        self._metrics: dict[tuple[Rotation | None, bool], Metric] = {}
        self._transfers: dict[bool, torch.Tensor | None] = {}
        columns = len(moments.fitted.mean)
        self._rotation = Rotation.of(columns, config.seed)
        method = "gptq" if config.method == "auto" else config.method
        self._methods = ("gptq", "als") if method == "gptq" else (method,)

    @property
    def left_out(self) -> str:
        """What a reason says of calibration inputs that could not be used."""
        unusable = self._moments.unusable
        return f"; {unusable}, left out" if unusable else ""

    def choose_rotation(
        self, goals: Mapping[str, Goal], planes: Mapping[str, int | Literal["auto"]]
    ) -> Rotation | None:
        """The rotation of the whole group: its layers read one input, rotated once or not.

        Judged by fits without refits: they lower both errors alike, and are most of the work.
        """
        if self._config.rotation == "none" or self._rotation.block == 1:
            return None
        if self._config.rotation == "hadamard":
            return self._rotation
        counts = {
            name: ROTATION_PLANES if asked == "auto" else asked for name, asked in planes.items()
        }
        errors = {
            rotation: sum(
                _best(found).error ** 2
                for found in self.candidates(goals, counts, rotation, 0).values()
            )
            for rotation in (None, self._rotation)
        }
        chosen = min(errors, key=lambda rotation: errors[rotation])
        self._metrics = {key: kept for key, kept in self._metrics.items() if key[0] == chosen}
        return chosen

    def candidates(
        self,
        goals: Mapping[str, Goal],
        planes: Mapping[str, int],
        rotation: Rotation | None,
        sweeps: int = SWEEPS,
    ) -> dict[str, list[Candidate]]:
        """One candidate a method, in a fixed order; weights that can be are fitted together."""
        alike: dict[tuple[bool, int], list[str]] = {}
        for name, goal in goals.items():
            alike.setdefault((goal.centred, planes[name]), []).append(name)
        found: dict[str, list[Candidate]] = {name: [] for name in goals}
        for (centred, count), names in alike.items():
            weights = [goals[name].weight for name in names]
            rotated = weights if rotation is None else [rotation.rotate(w) for w in weights]
            metric = self._metric(rotation, centred)
            for method in self._methods:
                fits = fit(rotated, metric, count, self._config, method, sweeps)
                for name, w, quantized in zip(names, weights, fits, strict=True):
                    held_out = self._moments.held_out
                    found[name].append(judged(w, quantized, method, rotation, held_out, centred))
        return found

    def target(self, w: torch.Tensor, centred: bool) -> Target:
        """What is fitted in the place of w fp32 [N, K]; w itself unless errors are compensated."""
        if "gptq" not in self._methods:
            return Target(w, w.new_zeros(len(w)))
        if centred not in self._transfers:
            self._transfers[centred] = transfer(self._moments, centred)
        return target_of(w, self._transfers[centred], self._moments, centred)

    def corrected(self, bias: torch.Tensor, target: Target, chosen: Candidate) -> torch.Tensor:
        """The bias that takes up the mean of the error."""
        wanted = bias.float() + target.shift
        return corrected_bias(wanted, chosen.difference, self._moments.fitted.mean).to(bias.dtype)

    def _metric(self, rotation: Rotation | None, centred: bool) -> Metric:
        key = (rotation, centred)
        if key not in self._metrics:
            self._metrics[key] = Metric.of(self._moments.fitted, centred, rotation)
        return self._metrics[key]
