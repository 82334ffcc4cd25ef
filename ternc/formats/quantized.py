"""`Quantized`: a weight as numbers, W = scale * multiplier * codes. Any device, no byte layout."""

from __future__ import annotations

import dataclasses

import torch

from ternc.config import INT8, LARGEST_CODE, MAX_MULTIPLIED_CODE
from ternc.errors import WeightShapeError
from ternc.formats.trits import planes_of


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a weight stays floating point, in words a user understands."""

    reason: str
    near_ternary: bool = False
    """Almost all elements are {-s, 0, s}; `reason` names those that are not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """W[n, k] = scale[n] * multiplier[n, k // g] * codes[n, k], or scale[n, k // g] * codes[n, k],
    or the sum over planes p of scale[n, k // g, p] * T_p[n, k].

    Raises:
        WeightShapeError: the tensors do not fit together.
    """

    codes: torch.Tensor
    """int8 [N, K], |codes| <= 1, 4, 13 for 1, 2, 3 planes, 127 for INT8."""
    scale: torch.Tensor
    """fp32 [N] (rows), [1] (tensor), [N, G] (free scales) or [N, G, P] (free scales a plane)."""
    multiplier: torch.Tensor | None
    """uint8 [N, G] with multiplier * max|codes| <= 127, or None where every multiplier is 1."""
    group_size: int
    """Columns of a group; 0 = none. The last group of a row may be short."""
    planes: int
    """Trit planes, 1 to 3: codes = sum over p of 3**(planes - 1 - p) * T_p, T_p in {-1, 0, 1}; or
    INT8: codes are integers of their own.
    """
    exact: bool = False
    """True where the weight already held these values, so that nothing was rounded."""

    def __post_init__(self) -> None:
        _require(self.codes.dim() == 2, f"codes have shape {tuple(self.codes.shape)}, not [N, K]")
        _require(self.codes.dtype == torch.int8, f"codes are {self.codes.dtype}, not int8")
        _require(self.scale.dtype == torch.float32, f"scale is {self.scale.dtype}, not float32")
        _require(self.planes in LARGEST_CODE, f"planes={self.planes}, not 1, 2, 3 or INT8")
        rows, columns = self.codes.shape
        groups = group_count(columns, self.group_size)
        shapes: list[tuple[int, ...]] = [(rows,), (1,)]
        if self.group_size and self.multiplier is None:
            shapes = [(rows, groups)]
            if self.planes in (2, 3):
                shapes.append((rows, groups, self.planes))
        seen = tuple(self.scale.shape)
        _require(seen in shapes, f"scale has shape {list(seen)}, not one of {shapes}")
        if self.multiplier is not None:
            seen = tuple(self.multiplier.shape)
            _require(seen == (rows, groups), f"multiplier {list(seen)}, not {[rows, groups]}")
            _require(self.multiplier.dtype == torch.uint8, "multiplier is not uint8")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def free_scales(self) -> bool:
        """True where every group has a scale of its own instead of a multiplier."""
        return self.scale.dim() >= 2

    @property
    def planewise(self) -> bool:
        """True where every plane of a group has a scale of its own."""
        return self.scale.dim() == 3

    def dequantize(self) -> torch.Tensor:
        """W as fp32 [N, K]; one rounding, of scale * (multiplier * codes); planes are added up."""
        if self.planewise:
            size, columns = self.group_size, self.shape[1]
            planes = zip(self.scale.unbind(2), planes_of(self.codes, self.planes), strict=True)
            return sum(expand_groups(s, size, columns) * t for s, t in planes)
        if self.free_scales:
            return expand_groups(self.scale, self.group_size, self.shape[1]) * self.codes
        values = self.codes.float()
        if self.multiplier is not None:
            values *= expand_groups(self.multiplier, self.group_size, self.shape[1])
        return values.mul_(self.scale[:, None])

    def relative_error(self, w: torch.Tensor) -> float:
        """||w - W|| / ||w||, Frobenius, for w [N, K] of any float dtype; 0 for an all-zero w."""
        error = frobenius(self.dequantize().sub_(w.detach()))
        return error / frobenius(w.detach()) if error else 0.0

    def describe(self) -> str:
        """Format for reports: `ternary x3 g128`, `ternary x1 row`, `int8 row`."""
        if self.group_size:
            unit = f"g{self.group_size}"
        else:
            unit = "tensor" if self.scale.shape == (1,) and self.shape[0] != 1 else "row"
        return f"{kind(self.planes)} {unit}"


def kind(planes: int) -> str:
    """What a weight is made of: `ternary x3`, `int8`."""
    return "int8" if planes == INT8 else f"ternary x{planes}"


def group_count(columns: int, group_size: int) -> int:
    """Groups of a row of `columns`, the last one possibly short; 0 where group_size is 0."""
    return -(-columns // group_size) if group_size else 0


def expand_groups(values: torch.Tensor, group_size: int, columns: int) -> torch.Tensor:
    """[N, G] -> [N, K], one value for every column of its group."""
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def frobenius(w: torch.Tensor) -> float:
    """sqrt(sum of w^2) of finite w, of any float dtype and size; waits for the device."""
    wide = torch.promote_types(w.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(w, dtype=wide))
    if not w.numel() or 1e-8 < norm < 1e15:
        return norm
    # Squares leave fp32: of numbers of at most one they do not.
    largest = float(w.abs().max())
    scaled = w.double() / largest if largest else w
    return largest * float(torch.linalg.vector_norm(scaled))


def is_finite(w: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass, no temporary. Waits for the device."""
    least, most = torch.aminmax(w)
    return bool(least.isfinite() & most.isfinite())


def check_multiplier(quantized: Quantized) -> None:
    """Raise WeightShapeError where multiplier * max|codes| could leave int8. Reads the data."""
    if quantized.multiplier is None or not quantized.multiplier.numel():
        return
    bound = MAX_MULTIPLIED_CODE // LARGEST_CODE[quantized.planes]
    _require(
        int(quantized.multiplier.max()) <= bound,
        f"multiplier {int(quantized.multiplier.max())} is over {bound}, the largest whose product "
        f"with a code of {quantized.planes} planes is an int8",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise WeightShapeError(f"quantised weight: {message}")
