"""ternc::fit in C++: no worse than the eager reference, the same for any threads and machine."""

from __future__ import annotations

import pytest
import torch
from reference import random_codes

from ternc.config import CODE_MAX
from ternc.formats import Quantized
from ternc.runtime import cpu, ops
from ternc.runtime.ops import fit

PLANES = pytest.mark.parametrize("planes", [1, 2, 3])


@pytest.fixture(autouse=True)
def library():
    ops.register()
    if cpu.isa() is None:
        pytest.skip("no C++ library")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def fitted(w, planes, group_size, refine=0, op=None):
    codes, scale, multiplier = (op or torch.ops.ternc.fit)(w, planes, group_size, refine)
    return Quantized(
        codes, scale, multiplier if group_size > 0 else None, max(group_size, 0), planes
    )


FITTED_WEIGHTS = {
    "gaussian": lambda: torch.randn(40, 260),
    "heavy tails": lambda: torch.randn(40, 260).pow(3),
    "zero rows and groups": lambda: (
        torch.randn(40, 260) * (torch.arange(40 * 260).view(40, 260) % 512 > 300)
    ),
    "one": lambda: torch.ones(1, 1),
}


@PLANES
@pytest.mark.parametrize("group_size", [128, 7, 0, -1])
@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("kind", FITTED_WEIGHTS)
def test_fit_is_no_worse_than_the_reference(planes, group_size, refine, kind):
    w = FITTED_WEIGHTS[kind]()
    seen = fitted(w, planes, group_size, refine)
    expected = fitted(w, planes, group_size, refine, fit.reference)
    assert seen.scale.shape == expected.scale.shape
    assert seen.codes.abs().max() <= CODE_MAX[planes]
    assert seen.relative_error(w) <= 1.001 * expected.relative_error(w)


@PLANES
@pytest.mark.parametrize("group_size", [128, 0, -1])
def test_all_zero(planes, group_size):
    for out in torch.ops.ternc.fit(torch.zeros(3, 9), planes, group_size, 1):
        assert (out == 0).all()


@pytest.mark.parametrize(("planes", "mse"), [(1, 0.187), (2, 0.0286), (3, 0.0041)])
def test_promised_error_of_gaussian_rows(planes, mse):
    w = torch.randn(256, 1024)
    assert fitted(w, planes, 128).relative_error(w) ** 2 <= mse * 1.01


@pytest.mark.parametrize("group_size", [128, 0, -1])
def test_error_falls_with_planes(group_size):
    w = torch.randn(64, 512)
    errors = [fitted(w, planes, group_size).relative_error(w) for planes in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@PLANES
@pytest.mark.parametrize("group_size", [128, 0, -1])
def test_weights_on_the_grid_come_back(planes, group_size):
    codes = random_codes(20, 256, planes)
    codes[:, ::128] = CODE_MAX[planes]
    w = codes * 0.375
    error = fitted(w, planes, group_size, 4).relative_error(w)
    # One plane is solved, and its scale rounded to fp16. Two and three are searched.
    assert error <= (2**-11 if planes == 1 else 0.05)


@pytest.mark.parametrize("group_size", [32, 0, -1])
def test_one_plane_is_exact(group_size):
    w = torch.randn(70, 1000)
    seen = fitted(w, 1, group_size).relative_error(w)
    assert abs(seen / fitted(w, 1, group_size, 0, fit.reference).relative_error(w) - 1) <= 1e-5


@PLANES
@pytest.mark.parametrize("group_size", [128, 0, -1])
def test_fit_is_the_same_for_any_threads_and_instruction_set(threads, planes, group_size):
    w = torch.randn(300, 700)
    outputs = []
    for count in (1, 2, 3):
        threads(count)
        outputs.append(torch.ops.ternc.fit(w, planes, group_size, 1))
    for isa in [name for name, reason in cpu.available().items() if reason is None]:
        cpu.force_isa(isa)
        outputs.append(torch.ops.ternc.fit(w, planes, group_size, 1))
    cpu.force_isa(None)
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


@PLANES
@pytest.mark.parametrize("factor", [2.0**-130, 2.0**-60, 2.0**120])
def test_fit_scales_with_the_weight(planes, factor):
    w = torch.randn(16, 256).to(torch.bfloat16).float()  # exact where subnormal
    codes, scale, multiplier = torch.ops.ternc.fit(w, planes, 128, 0)
    codes2, scale2, multiplier2 = torch.ops.ternc.fit(w * factor, planes, 128, 0)
    assert torch.equal(scale * factor, scale2)
    assert torch.equal(codes, codes2)
    assert torch.equal(multiplier, multiplier2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fit_reads_every_float_type(dtype):
    w = torch.randn(30, 96).to(dtype).T
    outputs = torch.ops.ternc.fit(w, 2, 32, 0)
    expected = torch.ops.ternc.fit(w.float().contiguous(), 2, 32, 0)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group_size", [32, 0, -1])
def test_fit_refuses_what_is_not_finite(value, group_size):
    w = torch.randn(30, 96)
    w[17, 50] = value
    with pytest.raises(RuntimeError, match=r"\[30, 96\] holds NaN or infinity"):
        torch.ops.ternc.fit(w, 2, group_size, 0)
