"""Fits, fake quantisers and blends in Triton's interpreter, on the CPU, against the references."""

from __future__ import annotations

import pytest
import torch
from interpreter import inside, outside, run_in_the_interpreter
from packed_weights import assert_same

from ternc.config import CODE_MAX
from ternc.formats.blend import ACTIVATION_BITS, WEIGHT_BITS, values_of
from ternc.formats.quantized import expand_groups
from ternc.formats.scales import round_to_storage
from ternc.runtime.ops import blend_quantize, fit, quantize_act


@outside
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@inside
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group_size", [0, 24, -1])
def test_fit(planes, group_size):
    """Scales nearly the reference's, codes too; values are those of the codes."""
    from ternc.runtime.kernels.triton import fit as kernels

    w = torch.randn(3, 60)
    w[2] = 0
    codes, scale, multiplier = kernels.fit(w, planes, group_size, 0)
    expected = fit.reference(w, planes, group_size, 0)
    torch.testing.assert_close(scale, expected[1], rtol=2e-2, atol=0)
    assert (codes != expected[0]).float().mean() < 0.02
    assert multiplier.shape == expected[2].shape
    m = expand_groups(multiplier, group_size, 60) if group_size > 0 else 1.0
    values = (scale[:, None] if len(scale) > 1 else scale) * (m * codes)
    assert_same(kernels.fake_quantize(w, planes, group_size), values.float())
    w[1, 3] = torch.nan
    assert kernels.fake_quantize(w, planes, group_size)[1].isnan().any()


@inside
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group_size", [0, 24])
def test_fit_of_long_rows(planes, group_size, monkeypatch):
    """Rows that no program holds: fitted in pieces."""
    from ternc.runtime.kernels.triton import fit as kernels
    from ternc.runtime.kernels.triton import fit_pieces

    w = torch.randn(3, 270) * torch.rand(270).exp()
    w[2] = 0
    codes, scale, multiplier = fit.reference(w, planes, group_size, 0)
    monkeypatch.setattr(kernels, "WIDEST", 128)
    monkeypatch.setattr(fit_pieces, "PIECE", 128)
    seen = kernels.fit(w, planes, group_size, 0)
    torch.testing.assert_close(seen[1], scale, rtol=2e-2, atol=0)
    assert (seen[0] != codes).float().mean() < 0.02
    assert (seen[2] != multiplier).sum() <= 1
    w[1, 250] = torch.nan
    values = kernels.fake_quantize(w, planes, group_size)
    assert values[1].isnan().any()


@inside
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gauss", "outlier", "ternary", "zero"])
def test_one_step_of_a_whole_weight(planes, kind):
    """Nearly the least error that the exact search finds."""
    from ternc.runtime.kernels.triton import fit_sums as kernels

    w = torch.randn(2, 3001)
    if kind == "outlier":
        w[0, 7] = 300.0
    elif kind == "ternary":
        w = torch.randint(-1, 2, (2, 3001)) * 0.37
    elif kind == "zero":
        w[0] = 0
    seen, known = kernels.optimal_steps(w, planes), fit.optimal_step(w, planes)
    most = CODE_MAX[planes]

    def error(step):
        return (w - step[:, None] * fit.snap(w, step[:, None], most)).square().sum(1)

    torch.testing.assert_close(error(seen), error(known), rtol=1e-4, atol=1e-6)
    if kind == "ternary":
        torch.testing.assert_close(seen, known, rtol=1e-6, atol=0)


@inside
@pytest.mark.parametrize("top", [1e-44, 3e-39, 0.7, 2.0**14, 2e37])
def test_scales_are_rounded_as_files_hold_them(top):
    from ternc.runtime.kernels.triton.snap import snap

    scale = torch.rand(9) * top
    scale[3:5] = torch.tensor([top, 0.0])
    _, stored = snap(torch.randn(9, 4), scale, None, 1, 0, torch.int8)
    assert torch.equal(stored, round_to_storage(scale))


BLENDS = [(16.0, 8.0, 0.25), (8.0, 4.0, 0.5), (4.0, 2.0, 1.0), (2.0, 1.58, 0.75), (1.58, 1.58, 1)]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blends_of_weights(dtype):
    from ternc.runtime.kernels.triton import blend as kernels

    w = torch.randn(2, 60).to(dtype)
    w[1] = 0
    final = kernels.fake_quantize(w, 2, 0)
    tolerance = torch.finfo(dtype).eps
    for source, target, share in BLENDS if dtype == torch.float16 else BLENDS[2:4]:
        ends = [final if bits == 1.58 else values_of(w, bits) for bits in (source, target)]
        state = torch.tensor([source, target, share])
        seen = kernels.blend_quantize(w, state, list(WEIGHT_BITS), 2, 0)
        torch.testing.assert_close(
            seen, torch.lerp(*ends, share), rtol=2 * tolerance, atol=tolerance
        )


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blends_of_activations(dtype, register_ops):
    from ternc.runtime.kernels.triton import blend as kernels

    x = torch.randn(2, 3, 130).to(dtype)
    x[0, 0, 5], x[1] = torch.nan, 0
    for numbers in (*BLENDS[:2], (8.0, 8.0, 1.0), (16.0, 16.0, 0.5)):
        state = torch.tensor(numbers)
        expected = blend_quantize.activation_reference(x, state, list(ACTIVATION_BITS))
        seen = kernels.blend_quantize_act(x, state, list(ACTIVATION_BITS))
        torch.testing.assert_close(seen, expected, equal_nan=True)


@inside
@pytest.mark.parametrize("columns", [127, 17000])
@pytest.mark.parametrize("bits", [8, 4])
def test_fake_quantize_act(columns, bits):
    from ternc.runtime.kernels.triton import quantize_act as kernels

    x = torch.randn(4, columns)
    x[1], x[2, 0] = 0, torch.nan
    q, scale = quantize_act.reference(x, bits)
    assert_same(kernels.fake_quantize_act(x, bits), q * scale)
