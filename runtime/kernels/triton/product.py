"""`Product`: one input times several weights of one kind, in one launch; and its kernels' epilogue.

The rows of the weights are cut in blocks of their own; a program finds out whose block it has.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ternc.runtime.kernels.triton.weight import Weight


@dataclasses.dataclass(frozen=True)
class Product:
    """y_i [M, N_i] = x W_i (+ b_i, + residual), for weights of one kind."""

    weights: tuple[Weight, ...]
    biases: tuple[torch.Tensor, ...] | None
    """One for every weight, or none at all."""
    outputs: tuple[torch.Tensor, ...]
    """[M, N_i], contiguous."""
    residual: torch.Tensor | None = None
    """[M, N_0], contiguous, in the dtype of the output; with one weight only."""

    @property
    def joint(self) -> Weight:
        """The weights as if their rows were one weight's: what tiles are chosen for."""
        rows = sum(weight.rows for weight in self.weights)
        return dataclasses.replace(self.weights[0], rows=rows)

    @property
    def stable(self) -> bool:
        """True where nothing wrote any of the weights since their last launch."""
        return all(weight.stable for weight in self.weights)

    def blocks(self, rows: int) -> int:
        """Blocks of `rows` weight rows; no block has rows of two weights."""
        return sum(-(-weight.rows // rows) for weight in self.weights)

    @property
    def paired(self) -> bool:
        """True where the two multipliers of every chunk can be read as one int16."""
        return all(weight.paired for weight in self.weights)

    def pointers(self, word: torch.dtype, paired: bool = False) -> dict[str, object]:
        """Arguments of a kernel: every weight's tensors, packed bytes as words of a type and,
        where `paired`, multipliers as int16.
        """
        stand_in = self.outputs[0]
        scales = tuple(weight.scale for weight in self.weights)
        multipliers = tuple(weight.multiplier_or(weight.scale) for weight in self.weights)
        return {
            "weight_ptrs": tuple(weight.bytes.view(word) for weight in self.weights),
            "scale_ptrs": scales,
            "multiplier_ptrs": tuple(m.view(torch.int16) for m in multipliers)
            if paired
            else multipliers,
            "bias_ptrs": scales if self.biases is None else self.biases,
            "y_ptrs": self.outputs,
            "residual_ptr": stand_in if self.residual is None else self.residual,
            "rows": tuple(weight.rows for weight in self.weights),
        }


def alike(weights: list[Weight], biases: list[torch.Tensor | None]) -> list[list[int]]:
    """Positions of the weights that one launch can take, launch by launch."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        kind = (
            weight.layout,
            weight.group_size if weight.groups > 1 or weight.multiplier is not None else 0,
            tuple(weight.scale.shape[1:]),
            weight.row_scales,
            None if bias is None else bias.dtype,
        )
        groups.setdefault(kind, []).append(i)
    return list(groups.values())


@triton.jit
def segment_start(rows, block, BLOCK_N: tl.constexpr):
    """First block of the weight that has block `block`; rows: a tuple, of every weight."""
    start = 0
    first = 0
    for i in tl.static_range(1, len(rows)):
        first += tl.cdiv(rows[i - 1], BLOCK_N)
        start = tl.where(block >= first, first, start)
    return start


@triton.jit
def segment_of(values, rows, block, BLOCK_N: tl.constexpr):
    """The entry of `values` of the weight that has block `block`."""
    value = values[0]
    first = 0
    for i in tl.static_range(1, len(rows)):
        first += tl.cdiv(rows[i - 1], BLOCK_N)
        value = tl.where(block >= first, values[i], value)
    return value


@triton.jit
def rounded_sum(y, residual):
    """y fp32 rounded to the dtype of the residual, then their sum rounded again."""
    return y.to(residual.dtype).to(tl.float32) + residual.to(tl.float32)
