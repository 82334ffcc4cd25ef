"""The step of least squared error of a whole weight, or of rows too long for a program.

A step a gives w the codes c = min(rint(|w| / a), most). Two sums say what it is worth: A of |w| c
and B of c c. Its error is that of w itself - 2 a A + a a B, and the best step for those codes A / B
leaves A A / B less. Candidates are summed side by side, in a fixed order, and chosen on the device:
    one plane: threshold a / 2 of largest A A / B, searched on ever finer grids; then A / B
    two, three: the best of RATIOS * max|w| / most, then Lloyd rounds, as the reference does
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.config import CODE_MAX
from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.snap import MOST_CODES, rounded_codes
from ternc.runtime.ops import fit as fit_op

CANDIDATES = 16
OCTAVES = 0.8
"""Between thresholds of the first grid: 16 of them reach from max|w| down to 2**-12 of it."""
FINER_GRIDS = 3
"""Each is 7.5 times as fine: the last one's thresholds are 0.2 % apart, where the error is flat."""

# A code is 1 from half a step on: steps of twice the thresholds.
_FIRST = {1: tuple(2.0 ** (1.0 - OCTAVES * i) for i in reversed(range(CANDIDATES)))}
_FIRST |= {
    planes: tuple(r / CODE_MAX[planes] for r in fit_op.RATIOS)
    + (0.0,) * (CANDIDATES - len(fit_op.RATIOS))
    for planes in (2, 3)
}
"""By planes: the steps tried first, in units of max|w|."""

BLOCK = 256
PARTS = 2048
"""Programs that share a weight of one scale."""
TOGETHER: tl.constexpr = tl.constexpr(32)
"""Programs whose sums are read at once."""


@triton.jit
def first_steps(largest_ptr, step_ptr, FACTORS: tl.constexpr, DEPENDENT: tl.constexpr):
    """One program a unit: steps [U, C] of FACTORS times the largest magnitude [U]."""
    unit = tl.program_id(0).to(tl.int64)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    largest = tl.load(largest_ptr + unit)
    for i in tl.static_range(len(FACTORS)):
        tl.store(step_ptr + unit * len(FACTORS) + i, largest * FACTORS[i])


@triton.jit
def step_sums(
    w_ptr, step_ptr, sum_ptr, length, part, parts,
    PLANES: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program u * parts + p: A and B of `part` values of unit u of w [U, length], for COUNT steps
    [U, COUNT] -> float64 [U, parts, 2, COUNT].
    """
    MOST: tl.constexpr = MOST_CODES[PLANES]
    unit = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * part.to(tl.int64)
    candidate, place = tl.arange(0, COUNT), tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_wait()
    step = tl.load(step_ptr + unit * COUNT + candidate)
    inverse, half = tl.where(step > 0.0, 1.0 / step, 0.0)[:, None], 0.5 * step[:, None]
    products = tl.zeros([COUNT, BLOCK], tl.float32)
    squares = tl.zeros([COUNT, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + part, length), BLOCK):
        k = start + place
        w = tl.load(w_ptr + unit * length + k, mask=k < length, other=0.0)
        w = tl.abs(w.to(tl.float32))[None, :]
        if MOST == 1:  # the same, in half the instructions
            kept = w > half
            products += tl.where(kept, w, 0.0)
            squares += tl.where(kept, 1.0, 0.0)
        else:
            codes = rounded_codes(w * inverse, MOST)
            products = tl.fma(w, codes, products)
            squares = tl.fma(codes, codes, squares)
    if DEPENDENT:
        gdc_launch_dependents()
    out = sum_ptr + tl.program_id(0).to(tl.int64) * (2 * COUNT) + candidate
    tl.store(out, tl.sum(products.to(tl.float64), axis=1))
    tl.store(out + COUNT, tl.sum(squares.to(tl.float64), axis=1))


@triton.jit
def pick(values, chosen):
    """The entry of a vector where `chosen`."""
    return tl.sum(tl.where(chosen, values, 0.0), axis=0)


@triton.jit
def choose_step(
    sum_ptr, step_ptr, next_ptr, parts,
    COUNT: tl.constexpr, NEXT: tl.constexpr, ROUNDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a unit: its sums and COUNT ascending steps -> NEXT steps to try.

    NEXT > 1: a grid between the neighbours of the step of largest A A / B. NEXT == 1: with ROUNDED
    the step of least error as it is, else A / B of the one of largest A A / B.
    """
    unit = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, COUNT)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    p = tl.arange(0, TOGETHER)[:, None]
    products = tl.zeros([TOGETHER, COUNT], tl.float64)
    squares = tl.zeros([TOGETHER, COUNT], tl.float64)
    for first in range(0, parts, TOGETHER):
        row = sum_ptr + (unit * parts + first + p) * (2 * COUNT) + candidate[None, :]
        products += tl.load(row, mask=first + p < parts, other=0.0)
        squares += tl.load(row + COUNT, mask=first + p < parts, other=0.0)
    products, squares = tl.sum(products, axis=0), tl.sum(squares, axis=0)
    step = tl.load(step_ptr + unit * COUNT + candidate)
    if ROUNDED:
        gain = step * (2.0 * products - step * squares)
    else:
        gain = tl.where(squares > 0.0, products * products / squares, 0.0)
    best = tl.min(tl.where(gain == tl.max(gain, axis=0), candidate, COUNT - 1), axis=0)
    if NEXT > 1:
        low = pick(step, candidate == tl.maximum(best - 1, 0))
        high = pick(step, candidate == tl.minimum(best + 1, COUNT - 1))
        i = tl.arange(0, NEXT)
        tl.store(next_ptr + unit * NEXT + i, low + (high - low) * (i.to(tl.float32) / (NEXT - 1)))
    else:
        chosen = pick(step, candidate == best)
        if not ROUNDED:
            product = pick(products, candidate == best)
            square = pick(squares, candidate == best)
            chosen = tl.where(square > 0.0, (product / square).to(tl.float32), chosen)
        tl.store(next_ptr + unit, chosen)


def optimal_steps(w: torch.Tensor, planes: int) -> torch.Tensor:
    """w [U, L], contiguous -> fp32 [U], a step a row; NaN where one is not finite."""
    least, most = torch.aminmax(w, dim=1)
    largest = torch.maximum(-least, most).float()
    steps = torch.empty((len(w), CANDIDATES), dtype=torch.float32, device=w.device)
    dependent = launch.dependent_launch(w.device)
    first_steps[(len(w),)](
        largest, steps, FACTORS=_FIRST[planes], DEPENDENT=dependent, launch_pdl=dependent
    )
    if planes == 1:
        for _ in range(FINER_GRIDS):
            steps = _chosen(w, steps, planes, CANDIDATES)
        step = _chosen(w, steps, planes, 1)
    else:
        step = _chosen(w, steps, planes, 1, rounded=True)
        for _ in range(fit_op.LLOYD_ROUNDS):
            step = _chosen(w, step, planes, 1)
    return step[:, 0] + 0.0 * largest


def _chosen(
    w: torch.Tensor, steps: torch.Tensor, planes: int, count: int, rounded: bool = False
) -> torch.Tensor:
    """Steps [U, C] -> [U, count], two launches."""
    units, length = w.shape
    tried = steps.shape[1]
    parts = max(1, min(PARTS // units, triton.cdiv(length, 8 * BLOCK)))
    part = triton.cdiv(triton.cdiv(length, parts), BLOCK) * BLOCK
    sums = torch.empty((units, parts, 2, tried), dtype=torch.float64, device=w.device)
    following = torch.empty((units, count), dtype=torch.float32, device=w.device)
    dependent = launch.dependent_launch(w.device)
    common = {"COUNT": tried, "DEPENDENT": dependent, "num_warps": 4, "launch_pdl": dependent}
    step_sums[(units * parts,)](
        w, steps, sums, length, part, parts, PLANES=planes, BLOCK=BLOCK, **common, **launch.EXACT
    )
    choose_step[(units,)](
        sums, steps, following, parts, NEXT=count, ROUNDED=rounded, **common, **launch.EXACT
    )
    return following
