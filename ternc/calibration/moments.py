"""`Moments`: inputs x of a layer -> E[x x^T] and E[x], for fitting and for judging apart.

Where the layer's inputs f in the float model are known too: E[d x^T] and E[d], d = f - x.

Rows of calibration data are taken in once and let go of: K x K numbers stay.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.formats.rotation import Rotation

LARGEST = 1e15
"""Values beyond it are taken like infinity: sums of their squares leave fp32."""


@dataclasses.dataclass
class Moments:
    """First and second moments of input rows [M, K]."""

    second: torch.Tensor
    """E[x x^T], fp32 [K, K]."""
    mean: torch.Tensor
    """E[x], fp32 [K]."""
    count: int
    """Rows taken in."""
    left_out: int = 0
    """Rows with NaN, infinity or values beyond `LARGEST`."""
    lag: torch.Tensor | None = None
    """E[d x^T], fp32 [K, K]; None where f is not known."""
    lag_mean: torch.Tensor | None = None
    """E[d], fp32 [K]."""

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> Moments:
        """No rows yet."""
        zeros = torch.zeros(columns, columns, device=device)
        return cls(zeros, zeros.new_zeros(columns), 0)

    def add(self, rows: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Takes in rows [M, K] of any float dtype; those with no finite squares are left out.

        Args:
            wanted: the same rows in the float model; given with every call or with none.
        """
        rows = rows.float()
        kept = _usable(rows)
        if wanted is not None:
            wanted = wanted.float()
            kept &= _usable(wanted)
            wanted = wanted[kept]
        self.left_out += len(rows)
        rows = rows[kept]
        self.left_out -= len(rows)
        total = self.count + len(rows)
        if not len(rows):
            return
        # A running mean, so that the numbers keep their size however much data there is.
        keep = self.count / total
        self.second.mul_(keep).addmm_(rows.T, rows, alpha=1 / total)
        self.mean.mul_(keep).add_(rows.sum(0), alpha=1 / total)
        if wanted is not None:
            self._add_lag(wanted - rows, rows, keep, total)
        self.count = total

    def _add_lag(
        self, difference: torch.Tensor, rows: torch.Tensor, keep: float, total: int
    ) -> None:
        if self.lag is None or self.lag_mean is None:
            self.lag, self.lag_mean = torch.zeros_like(self.second), torch.zeros_like(self.mean)
        self.lag.mul_(keep).addmm_(difference.T, rows, alpha=1 / total)
        self.lag_mean.mul_(keep).add_(difference.sum(0), alpha=1 / total)

    def covariance(self) -> torch.Tensor:
        """E[(x - E x)(x - E x)^T]: what is left of an error once a bias takes up its mean."""
        return self.second - torch.outer(self.mean, self.mean)

    def metric(self, centred: bool) -> torch.Tensor:
        """The covariance, or the second moment where no bias takes up the mean."""
        return self.covariance() if centred else self.second

    def lag_metric(self, centred: bool) -> torch.Tensor | None:
        """E[d x^T], of both about their means if `centred`; None where f is not known."""
        if self.lag is None or self.lag_mean is None or not centred:
            return self.lag
        return self.lag - torch.outer(self.lag_mean, self.mean)

    def rotated(self, rotation: Rotation) -> Moments:
        """Moments of the rotated rows, R^T E[x x^T] R; without the lag."""
        half = rotation.rotate(self.second)
        second = rotation.rotate(half.T.contiguous())
        return Moments((second + second.T) / 2, rotation.rotate(self.mean), self.count)


def _usable(rows: torch.Tensor) -> torch.Tensor:
    """Which rows [M, K] have no NaN and nothing beyond `LARGEST`: bool [M]."""
    return (rows.abs() <= LARGEST).all(1)


@dataclasses.dataclass
class SplitMoments:
    """Moments of the rows that codes are fitted to, and of those that the fit is judged by."""

    fitted: Moments
    held_out: Moments

    @classmethod
    def empty(cls, columns: int, device: torch.device) -> SplitMoments:
        return cls(Moments.empty(columns, device), Moments.empty(columns, device))

    @property
    def unusable(self) -> str:
        """What a report says of rows that were left out; "" where none was."""
        count = self.fitted.left_out + self.held_out.left_out
        total = count + self.fitted.count + self.held_out.count
        seen = f"NaN, infinity or values beyond {LARGEST:g} in {count:,} of {total:,} rows"
        return f"its calibration inputs hold {seen}" if count else ""


def output_error(difference: torch.Tensor, w: torch.Tensor, moments: torch.Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)): relative error of the outputs on the rows behind H.

    Args:
        difference: W - Q, fp32 [N, K].
        w: fp32 [N, K].
        moments: second moment or covariance of the inputs, fp32 [K, K].
    """
    numerator = ((difference @ moments) * difference).sum(dtype=torch.float64)
    denominator = ((w @ moments) * w).sum(dtype=torch.float64)
    return float((numerator.clamp(min=0) / denominator.clamp(min=1e-300)).sqrt())
