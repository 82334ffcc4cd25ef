"""fit and fake_quantize: optimality, promised errors, degenerate weights, kernel agreement."""

from __future__ import annotations

import itertools

import pytest
import torch

from ternc.config import CODE_MAX
from ternc.errors import DifferentiationError, KernelError, WeightShapeError
from ternc.formats.quantized import Quantized, check_multiplier
from ternc.formats.scales import scale_to_storage
from ternc.runtime.ops import fit

pytestmark = pytest.mark.usefixtures("register_ops")

PLANES = pytest.mark.parametrize("planes", [1, 2, 3])
GROUPS = pytest.mark.parametrize("group_size", [32, 0, -1])


def quantized(w: torch.Tensor, planes: int, group_size: int, refine: int, op=None) -> Quantized:
    codes, scale, multiplier = (op or torch.ops.ternc.fit)(w, planes, group_size, refine)
    return Quantized(
        codes, scale, multiplier if group_size > 0 else None, max(group_size, 0), planes
    )


WEIGHTS = {
    "gaussian": lambda: torch.randn(40, 128),
    "short last group": lambda: torch.randn(7, 75),
    "heavy tails": lambda: torch.randn(33, 96).pow(3),
    "rows of many sizes": lambda: torch.randn(20, 64) * torch.logspace(-6, 3, 20)[:, None],
    "groups of many sizes": lambda: torch.randn(9, 128) * torch.logspace(-3, 1, 128),
    "zero rows and groups": lambda: (
        torch.randn(8, 96) * (torch.arange(8 * 96).view(8, 96) % 64 > 31)
    ),
    "one element": lambda: torch.randn(1, 1),
    "very small": lambda: torch.randn(5, 64) * 1e-30,
}


@pytest.mark.parametrize(("planes", "mse"), [(1, 0.187), (2, 0.0286), (3, 0.0041)])
def test_promised_error_of_gaussian_rows(planes, mse):
    w = torch.randn(256, 1024)
    assert quantized(w, planes, 128, 0).relative_error(w) ** 2 <= mse * 1.01


@PLANES
def test_row_scales_are_near_the_best_step(planes):
    w = torch.randn(16, 200)
    fitted = quantized(w, planes, 0, 8)
    cmax = CODE_MAX[planes]
    steps = torch.linspace(0.02, 1.0, 2000)[:, None, None] * w.abs().amax(1)[:, None] / cmax
    errors = torch.stack([(w - s * fit.snap(w, s, cmax)).square().sum(1) for s in steps])
    seen = (w - fitted.dequantize()).square().sum(1)
    # The search starts from 14 steps a row: a row may end in a neighbouring local minimum.
    assert (seen <= errors.amin(0) * (1.0005 if planes == 1 else 1.1)).all()
    assert seen.sum() <= errors.amin(0).sum() * 1.02


def test_one_plane_is_the_exact_optimum():
    # By brute force over every subset of kept elements, each with its best level.
    w = torch.randn(6, 9)
    fitted = quantized(w, 1, 0, 0)
    masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=9))[1:]).double()
    for values, found in zip(w.double(), fitted.dequantize().double(), strict=True):
        level = (masks @ values.abs()) / masks.sum(1)
        candidates = values.sign() * masks * level[:, None]
        best = (values - candidates).square().sum(1).min()
        assert (values - found).square().sum() <= best * (1 + 1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
@PLANES
@GROUPS
def test_form(name, planes, group_size):
    w = WEIGHTS[name]()
    fitted = quantized(w, planes, group_size, 0)
    assert fitted.codes.abs().max() <= CODE_MAX[planes]
    check_multiplier(fitted)
    assert fitted.scale.shape == ((1,) if group_size == -1 else (len(w),))
    assert scale_to_storage(fitted.scale)[0].dtype == torch.float16
    assert fitted.dequantize().isfinite().all()
    if name not in ("heavy tails", "rows of many sizes", "groups of many sizes"):
        assert fitted.relative_error(w) <= {1: 0.72, 2: 0.36, 3: 0.15}[planes]


@pytest.mark.parametrize("name", WEIGHTS)
@PLANES
@GROUPS
@pytest.mark.parametrize("refine", [0, 3])
def test_the_kernel_is_as_good_as_the_reference(name, planes, group_size, refine):
    w = WEIGHTS[name]()
    kernel = quantized(w, planes, group_size, refine)
    reference = quantized(w, planes, group_size, refine, fit.reference)
    expected = reference.relative_error(w)
    # A single element is off by the rounding of its scale to fp16 alone.
    rounding = 2.0**-11 if w.numel() == 1 else 1e-6
    assert kernel.relative_error(w) == pytest.approx(expected, rel=1e-3, abs=rounding)


@PLANES
@GROUPS
def test_codes_are_the_nearest(planes, group_size):
    w = torch.randn(20, 96)
    fitted = quantized(w, planes, group_size, 0)
    step = fitted.scale[:, None].expand(20, 96)
    if group_size > 0:
        step = step * fitted.multiplier.repeat_interleave(group_size, 1)
    assert torch.equal(fitted.codes.float(), fit.snap(w, step, CODE_MAX[planes]))


@PLANES
def test_all_zero_weight(planes):
    for group_size in (32, 0, -1):
        codes, scale, multiplier = torch.ops.ternc.fit(torch.zeros(3, 64), planes, group_size, 2)
        assert not codes.any()
        assert not scale.any()
        assert not multiplier.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@GROUPS
def test_weight_that_is_not_finite(value, group_size):
    w = torch.randn(4, 64)
    w[1, 5] = value
    with pytest.raises(KernelError, match=r"weight \[4, 64\] holds NaN or infinity"):
        fit.reference(w, 2, group_size, 0)
    with pytest.raises(RuntimeError, match=r"weight \[4, 64\] holds NaN or infinity"):
        torch.ops.ternc.fit(w, 2, group_size, 0)


def test_all_zero_group_has_multiplier_zero():
    w = torch.randn(4, 96)
    w[1, 32:64] = 0
    _, _, multiplier = torch.ops.ternc.fit(w, 2, 32, 0)
    assert (multiplier == 0).nonzero().tolist() == [[1, 1]]


@PLANES
@GROUPS
def test_refinement_does_not_worsen_the_fit(planes, group_size):
    w = torch.randn(30, 200).pow(3)
    closed = quantized(w, planes, group_size, 0).relative_error(w)
    assert quantized(w, planes, group_size, 8).relative_error(w) <= closed * 1.0005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_fitted_in_float32(dtype):
    w = torch.randn(9, 64).to(dtype)
    seen = torch.ops.ternc.fit(w, 3, 32, 0)
    expected = torch.ops.ternc.fit(w.float(), 3, 32, 0)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_rows_do_not_depend_on_each_other():
    w = torch.randn(300, 64)
    codes, _, multiplier = torch.ops.ternc.fit(w, 2, 32, 0)
    part_codes, _, part_multiplier = torch.ops.ternc.fit(w[100:200].contiguous(), 2, 32, 0)
    assert torch.equal(codes[100:200], part_codes)
    assert torch.equal(multiplier[100:200], part_multiplier)


def test_weights_of_several_chunks(monkeypatch):
    w = torch.randn(50, 64)
    whole = fit.reference(w, 2, 32, 0)
    monkeypatch.setattr(fit, "CHUNK", 700)
    assert all(torch.equal(a, b) for a, b in zip(whole, fit.reference(w, 2, 32, 0), strict=True))


def test_gradient_is_refused():
    with pytest.raises(DifferentiationError, match="use ternc::fake_quantize"):
        torch.ops.ternc.fit(torch.randn(4, 8, requires_grad=True), 1, 0, 0)


@pytest.mark.parametrize(
    ("w", "numbers", "error", "message"),
    [
        (torch.zeros(3), (1, 0, 0), WeightShapeError, "not a floating-point \\[N, K\\]"),
        (torch.zeros(3, 4, dtype=torch.int8), (1, 0, 0), WeightShapeError, "weight is torch.int8"),
        (torch.zeros(3, 0), (1, 0, 0), WeightShapeError, "in_features is 1 to 131,072"),
        (torch.zeros(3, 4), (4, 0, 0), KernelError, "planes=4"),
        (torch.zeros(3, 4), (1, -2, 0), KernelError, "group_size=-2"),
        (torch.zeros(3, 4), (1, 0, -1), KernelError, "refine=-1"),
    ],
)
def test_refused_arguments(w, numbers, error, message):
    with pytest.raises(error, match=message):
        fit.reference(w, *numbers)
    with pytest.raises(error, match=message):
        torch.ops.ternc.fit(w.to("meta"), *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@PLANES
@GROUPS
def test_fake_quantize(planes, group_size, dtype):
    w = torch.randn(9, 75).to(dtype).requires_grad_()
    y = torch.ops.ternc.fake_quantize(w, planes, group_size)
    expected = quantized(w.detach(), planes, group_size, 0).dequantize()
    assert torch.equal(y, expected.to(dtype))
    weights = torch.randn(9, 75).to(dtype)
    (y * weights).sum().backward()
    assert torch.equal(w.grad, weights)


@PLANES
@GROUPS
def test_opcheck(planes, group_size):
    w = torch.randn(6, 40)
    torch.library.opcheck(torch.ops.ternc.fit, (w, planes, group_size, 1))
    torch.library.opcheck(torch.ops.ternc.fake_quantize, (w, planes, group_size))
    torch.library.opcheck(torch.ops.ternc.fake_quantize, (w.requires_grad_(), planes, group_size))
