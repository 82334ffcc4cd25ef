"""The quantisers of every bit-width, against the errors that theory and measurement give."""

import pytest
import torch

from ternc.formats.blend import (
    WEIGHT_BITS,
    blend,
    blended,
    four_levels,
    uniform,
    values_by_bits,
)
from ternc.train.quantizers import ternary


def relative(values, w):
    return ((values - w).norm() / w.norm()).item()


@pytest.fixture
def w(register_ops):
    return torch.randn(64, 1024)


def test_bit_widths_are_ordered_and_have_their_error(w):
    errors = [relative(uniform(w, 8), w), relative(uniform(w, 4), w), relative(four_levels(w), w)]
    errors.append(relative(ternary(w, 1, 0, "fit").dequantize(), w))
    assert errors == sorted(errors)
    assert errors == pytest.approx([0.0078, 0.14, 0.345, 0.436], rel=0.06)
    assert relative(ternary(w, 1, 0, "absmean").dequantize(), w) == pytest.approx(0.513, rel=0.02)


def test_eight_bits_have_their_levels():
    w = torch.randn(16, 256)
    step = w.abs().amax(1, keepdim=True) / 127
    assert (uniform(w, 8) / step).round().unique().numel() > 200
    assert (four_levels(w)[0] * 1e4).round().unique().numel() == 4


@pytest.mark.parametrize("group_size", [-1, 0, 32, 48])
@pytest.mark.parametrize("scale", ["fit", "absmean"])
def test_ternary_values_are_its_codes(register_ops, group_size, scale):
    w = torch.randn(8, 128)
    quantized = ternary(w, 1, group_size, scale)
    assert set(quantized.codes.unique().tolist()) <= {-1, 0, 1}
    if scale == "absmean" and group_size <= 0:
        mean = w.abs().mean() if group_size < 0 else w.abs().mean(1, keepdim=True)
        expected = (w / mean).round().clamp(-1, 1) * mean
        assert torch.allclose(quantized.dequantize(), expected, rtol=1e-3)
    if scale == "fit":
        group = max(group_size, -1)
        op = torch.ops.ternc.fake_quantize(w, 1, group)
        assert torch.equal(op, quantized.dequantize())


def test_rows_of_zeros_stay_zeros(register_ops):
    w = torch.zeros(3, 64)
    for values in (uniform(w, 8), four_levels(w), ternary(w, 1, 16, "absmean").dequantize()):
        assert torch.equal(values, w)


def test_blend_is_exact_at_its_ends(w):
    final = ternary(w, 1, 0, "fit").dequantize()
    values = values_by_bits(w, (16.0, 8.0, 4.0, 2.0, 1.58), final)
    pairs = ((16.0, 8.0), (8.0, 4.0), (4.0, 2.0), (2.0, 1.58))
    for source, target in pairs:
        start, middle, end = (
            blended(values, torch.tensor([source, target, m])) for m in (0.0, 0.25, 1.0)
        )
        assert torch.equal(start, values[source])
        assert torch.equal(end, values[target])
        assert torch.allclose(middle, 0.75 * values[source] + 0.25 * values[target], atol=1e-6)


@pytest.mark.parametrize("state", [(16, 8, 0.3), (8, 4, 0.0), (4, 2, 1.0), (2, 1.58, 0.7)])
def test_blend_computes_only_two_formats_and_the_same_values(state):
    """What a state in host memory leaves out changes nothing; on a device all are computed."""
    w, asked = torch.randn(6, 32), []
    final = torch.ops.ternc.fake_quantize(w, 1, 0)

    def quantizer(bits):
        asked.append(bits)
        return values_by_bits(w, (bits,), final)[bits]

    state = torch.tensor(state)
    everything = blended(values_by_bits(w, WEIGHT_BITS, final), state)
    torch.testing.assert_close(blend(WEIGHT_BITS, state, quantizer), everything, rtol=0, atol=0)
    assert len(asked) <= 2
    op = torch.ops.ternc.blend_quantize(w, state, WEIGHT_BITS, 1, 0)
    torch.testing.assert_close(op, everything, rtol=0, atol=0)
