"""`Grid`: the values s * m * c that a weight may take, while its steps s * m are being fitted.

step[n, g] real (free)  |  scale[n] * multiplier[n, g], multiplier an integer (tied)
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.config import CODE_MAX, MAX_MULTIPLIED_CODE, Config
from ternc.formats.quantized import Quantized, expand_groups, group_count
from ternc.formats.scales import round_to_storage
from ternc.runtime.ops.fit import optimal_step, snap

LLOYD_ROUNDS = 4
"""Rounds of weighted least squares on the step of a group, from the unweighted optimum."""

SCALE_TRIALS = 33
"""Scales tried for a row: its largest step as multiplier most/2 ... most."""


@dataclasses.dataclass
class Grid:
    """Steps of a weight [N, K]; `steps` is filled in by the fits."""

    planes: int
    group_size: int
    """Columns of a group, 0 = one step a row, -1 = one step in all."""
    columns: int
    steps: torch.Tensor
    """fp32 [N, G]; G = 1 where there are no groups."""
    scale: torch.Tensor | None = None
    """fp32 [N]: every step is an integer multiple of it. None: steps are free."""

    @classmethod
    def of(cls, w: torch.Tensor, planes: int, config: Config) -> Grid:
        """The grid that `config` gives a weight [N, K], its steps still zero."""
        group = config.fit_group
        group = 0 if group >= w.shape[1] else group
        groups = group_count(w.shape[1], group) if group > 0 else 1
        return cls(planes, group, w.shape[1], w.new_zeros((w.shape[0], groups)))

    @property
    def cmax(self) -> int:
        """Largest |code|."""
        return CODE_MAX[self.planes]

    @property
    def most(self) -> int:
        """Largest multiplier."""
        return MAX_MULTIPLIED_CODE // self.cmax

    @property
    def columns_per_group(self) -> int:
        return self.group_size if self.group_size > 0 else self.columns

    def expanded(self) -> torch.Tensor:
        """The step of every weight, fp32 [N, K]."""
        return expand_groups(self.steps, self.columns_per_group, self.columns)

    def nearest(self, w: torch.Tensor) -> torch.Tensor:
        """Codes fp32 [N, K] of the values nearest to w."""
        return snap(w, self.expanded(), self.cmax)

    def of_rows(self, rows: slice) -> Grid:
        """The grid of some rows; all of them where they share one step."""
        scale = None if self.scale is None else self.scale[rows]
        return dataclasses.replace(self, steps=self.steps[rows], scale=scale)

    def fit_group(self, group: int, w: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sets and returns the steps [N] of one group: least sum_j weight_j (w_j - step c_j)^2.

        Args:
            w: the columns of the group as they are now, fp32 [N, L].
            weight: metric of those columns, fp32 [L], positive.
        """
        units, metric = (w.reshape(1, -1), weight.repeat(len(w))) if self._shared else (w, weight)
        step = optimal_step(units, self.planes)
        for _ in range(LLOYD_ROUNDS):
            codes = snap(units, step[:, None], self.cmax)
            square = (codes.square() * metric).sum(1)
            step = torch.where(square > 0, (units * codes * metric).sum(1) / square, step)
        if self.scale is not None:
            step = self._nearest_multiple(w, step, weight)
        self.steps[:, group] = step
        return self.steps[:, group]

    def tie(self, energy: torch.Tensor) -> None:
        """Makes the free steps integer multiples of one scale a row, and fixes that scale.

        Args:
            energy: what an error of a step costs, [N, G]; the sum of cost * error^2 is least.
        """
        largest = self.steps.amax(1)
        best = torch.full_like(largest, torch.inf)
        scale = largest / self.most
        for trial in torch.linspace(self.most / 2, self.most, SCALE_TRIALS).tolist():
            candidate = largest / trial
            multiplier = self._multiplier(self.steps, candidate)
            error = (energy * (self.steps - candidate[:, None] * multiplier).square()).sum(1)
            scale = torch.where(error < best, candidate, scale)
            best = torch.minimum(error, best)
        self.scale = scale
        self.steps = scale[:, None] * self._multiplier(self.steps, scale)

    def multiplier(self) -> torch.Tensor:
        """The integers steps / scale, fp32 [N, G]."""
        assert self.scale is not None, "a free grid has no multipliers"
        return self._multiplier(self.steps, self.scale)

    def quantized(self, codes: torch.Tensor) -> Quantized:
        """codes fp32 [N, K] on this grid as a weight of the format; scales rounded to storage."""
        grouped = self.group_size > 0
        if self.scale is not None:
            scale, multiplier = self.scale, self.multiplier().to(torch.uint8)
        else:
            scale, multiplier = (self.steps if grouped else self.steps[:, 0]), None
            scale = scale[:1] if self._shared else scale
        return Quantized(
            codes=codes.to(torch.int8),
            scale=round_to_storage(scale.contiguous()),
            multiplier=multiplier,
            group_size=max(self.group_size, 0),
            planes=self.planes,
        )

    @property
    def _shared(self) -> bool:
        """One step for the whole weight."""
        return self.group_size == -1

    def _multiplier(self, steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        whole = (steps / scale[:, None]).round().clamp(1, self.most)
        return torch.where((steps > 0) & (scale > 0)[:, None], whole, 0.0)

    def _nearest_multiple(
        self, w: torch.Tensor, step: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The better of floor and ceil of step / scale, by the error on w."""
        assert self.scale is not None
        quotient = torch.where(self.scale > 0, step / self.scale, 0.0)
        best, error = torch.zeros_like(step), torch.full_like(step, torch.inf)
        for whole in (quotient.floor(), quotient.ceil()):
            candidate = self.scale * torch.where(step > 0, whole.clamp(1, self.most), 0.0)
            difference = w - candidate[:, None] * snap(w, candidate[:, None], self.cmax)
            squares = (difference.square() * weight).sum(1)
            best = torch.where(squares < error, candidate, best)
            error = torch.minimum(squares, error)
        return best
