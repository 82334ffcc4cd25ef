"""Free scales of several planes: W[n, k] = sum over p of scale[n, k // g, p] * T_p[n, k].

Kernels know scales by group. So the planes stand side by side in the columns of a weight of one
plane, group by group, every group whole (padded with code 0):

    codes [N, K], scale [N, G, P] <-> trits [N, G P g], scale [N, G P];  x [..., K] -> [..., G P g]

and the product of the two is the sum above, integers within a group and plane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ternc.formats.quantized import group_count
from ternc.formats.trits import planes_of


def width(columns: int, planes: int, group_size: int) -> int:
    """Columns of the weight of one plane."""
    return group_count(columns, group_size) * planes * group_size


def spread(codes: torch.Tensor, planes: int, group_size: int) -> torch.Tensor:
    """Codes int8 [N, K] -> trits int8 [N, G P g]."""
    trits = F.pad(planes_of(codes, planes), (0, -codes.shape[1] % group_size))
    return trits.unflatten(2, (-1, group_size)).permute(1, 2, 0, 3).flatten(1).contiguous()


def gathered(trits: torch.Tensor, planes: int, group_size: int, columns: int) -> torch.Tensor:
    """The inverse of `spread`: codes int8 [N, K]."""
    parts = trits.unflatten(1, (-1, planes, group_size))
    codes = parts[:, :, 0]
    for plane in range(1, planes):
        codes = 3 * codes + parts[:, :, plane]
    return codes.flatten(1)[:, :columns].contiguous()


def spread_input(x: torch.Tensor, planes: int, group_size: int, bits: int | None) -> torch.Tensor:
    """x [..., K] of any float dtype -> [..., G P g]: every group once for each plane.

    The numbers in the place of missing columns meet code 0; they are such that the scale which
    `bits` bits give the row stays what it is: zeros, or for 4 bits the mean of |x|.
    """
    if missing := -x.shape[-1] % group_size:
        fill = x.abs().mean(-1, keepdim=True) if bits == 4 else torch.zeros_like(x[..., :1])
        x = torch.cat((x, fill.expand(*x.shape[:-1], missing)), -1)
    parts = x.unflatten(-1, (-1, 1, group_size))
    return parts.expand(*parts.shape[:-2], planes, group_size).flatten(-3)


def folded(values: torch.Tensor, planes: int, group_size: int, columns: int) -> torch.Tensor:
    """Values [..., G P g] of the planes -> their sums [..., K], the largest plane first."""
    parts = values.unflatten(-1, (-1, planes, group_size))
    total = parts[..., 0, :]
    for plane in range(1, planes):
        total = total + parts[..., plane, :]
    return total.flatten(-2)[..., :columns]
