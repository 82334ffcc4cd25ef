"""`PlaneGrid`: the values that a weight may take where every plane has a scale of its own.

scale[n, g, p] real; the value of a code is the sum over its trits of scale * T_p
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.calibration.grid import Grid
from ternc.config import CODE_MAX, Config
from ternc.formats.planewise_fit import fit_scales, levels_of, nearest
from ternc.formats.quantized import Quantized, group_count
from ternc.formats.scales import round_to_storage
from ternc.runtime.ops.fit import optimal_step

ROUNDS = 8
"""Rounds of least squares on the scales of a group, from each of two starts."""


@dataclasses.dataclass
class PlaneGrid:
    """Plane scales of a weight [N, K]; `scales` is filled in by the fits."""

    planes: int
    group_size: int
    columns: int
    scales: torch.Tensor
    """fp32 [N, G, P]."""

    @property
    def cmax(self) -> int:
        """Largest |code|."""
        return CODE_MAX[self.planes]

    @property
    def columns_per_group(self) -> int:
        return self.group_size

    def of_rows(self, rows: slice) -> PlaneGrid:
        """The grid of some rows."""
        return dataclasses.replace(self, scales=self.scales[rows])

    def fit_group(self, group: int, w: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sets the scales of one group, least sum_j weight_j (w_j - value_j)^2; its levels [N, C].

        Args:
            w: the columns of the group as they are now, fp32 [N, L].
            weight: metric of those columns, fp32 [L], positive.
        """
        step = optimal_step(w, self.planes)
        self.scales[:, group] = fit_scales(w, step, self.planes, ROUNDS, weight)
        return levels_of(self.scales[:, group])

    def nearest(self, w: torch.Tensor) -> torch.Tensor:
        """Codes fp32 [N, K] of the values nearest to w."""
        parts = zip(w.split(self.group_size, 1), self.scales.unbind(1), strict=True)
        return torch.cat([nearest(part, scales) for part, scales in parts], 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [N, K] stand for, fp32."""
        levels, parts = levels_of(self.scales), (codes + self.cmax).long().split(self.group_size, 1)
        return torch.cat([levels[:, group].gather(1, part) for group, part in enumerate(parts)], 1)

    def quantized(self, codes: torch.Tensor) -> Quantized:
        """codes fp32 [N, K] on this grid as a weight of the format; scales rounded to storage."""
        return Quantized(
            codes=codes.to(torch.int8),
            scale=round_to_storage(self.scales.contiguous()),
            multiplier=None,
            group_size=self.group_size,
            planes=self.planes,
        )


def grid_of(w: torch.Tensor, planes: int, config: Config) -> Grid | PlaneGrid:
    """The grid that `config` gives a weight [N, K]; nothing is fitted yet."""
    group, (rows, columns) = config.fit_group, w.shape
    if config.tie_scales or planes == 1 or not 0 < group < columns:
        return Grid.of(w, planes, config)
    scales = w.new_zeros((rows, group_count(columns, group), planes))
    return PlaneGrid(planes, group, columns, scales)
