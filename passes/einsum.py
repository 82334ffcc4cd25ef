"""einsum(equation, x, W) -> F.linear on W as a matrix, or bmm where x and W share a batch letter.

"bsd,hkd->bshk"   linear(x, W.flatten(0, 1)).unflatten(-1, (h, k))
"ecd,edf->ecf"    bmm(x, W)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

_ELLIPSIS = "..."


def read_einsum(
    equation: str, ranks: tuple[int, int], swapped: bool
) -> Callable[[Any, Any, None], torch.Tensor] | str:
    """Code that computes the einsum of (x, W) through one linear, or why there is none.

    Args:
        ranks: dimensions of x and of W.
        swapped: the equation names W first.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    first, comma, second = inputs.partition(",")
    if not arrow or not comma or "," in second:
        return "the equation of the einsum has no '->', or not two operands"
    x, w = (second, first) if swapped else (first, second)
    if _ELLIPSIS in w:
        return "the weight of the einsum has '...'"
    spread = ranks[0] - len(x.replace(_ELLIPSIS, ""))
    dims, weight, result = _letters(x, spread), list(w), _letters(out, spread)
    if len(dims) != ranks[0] or len(weight) != ranks[1]:
        return "the equation does not fit the operands"
    if any(len(set(letters)) != len(letters) for letters in (dims, weight, result)):
        return "a letter stands twice in one operand of the einsum"
    shared = [letter for letter in weight if letter in dims]
    batch = [letter for letter in shared if letter in result]
    summed = [letter for letter in shared if letter not in result]
    kept = [letter for letter in weight if letter not in dims]
    lead = [letter for letter in dims if letter not in weight]
    if not summed or not kept or sorted(lead + kept + batch) != sorted(result):
        return "the einsum is no product of rows with a matrix"
    if batch:
        return _batched(dims, weight, result, (batch, lead, summed, kept))

    def build(tensor: Any, matrix: Any, bias: None) -> torch.Tensor:
        sizes = [matrix.shape[weight.index(letter)] for letter in kept]
        rows = _permuted(tensor, dims, lead + summed)
        rows = rows.flatten(-len(summed)) if len(summed) > 1 else rows
        flat = _permuted(matrix, weight, kept + summed)
        flat = flat.flatten(0, len(kept) - 1) if len(kept) > 1 else flat
        y = F.linear(rows, flat.flatten(1) if len(summed) > 1 else flat)
        y = y.unflatten(-1, sizes) if len(kept) > 1 else y
        return _permuted(y, lead + kept, result)

    return build


def _letters(operand: str, spread: int) -> list[str]:
    """Names of the dimensions of one operand; "..." stands for `spread` of them."""
    before, found, after = operand.partition(_ELLIPSIS)
    return [*before, *(f".{i}" for i in range(spread if found else 0)), *after]


def _batched(
    dims: list[str],
    weight: list[str],
    result: list[str],
    parts: tuple[list[str], list[str], list[str], list[str]],
) -> Callable[[Any, Any, None], torch.Tensor] | str:
    batch, lead, summed, kept = parts
    if any(len(part) != 1 for part in parts):
        return "the einsum is no product of one stack of rows with one stack of matrices"

    def build(tensor: Any, stack: Any, bias: None) -> torch.Tensor:
        rows = _permuted(tensor, dims, batch + lead + summed)
        y = torch.bmm(rows, _permuted(stack, weight, batch + summed + kept))
        return _permuted(y, batch + lead + kept, result)

    return build


def _permuted(tensor: Any, letters: Sequence[str], wanted: Sequence[str]) -> Any:
    if list(letters) == list(wanted):
        return tensor
    return tensor.permute(*(list(letters).index(letter) for letter in wanted))
