"""fp16 scales with one exponent: rounding, lossless storage, extreme magnitudes."""

from __future__ import annotations

import pytest
import torch

from ternc.formats.scales import round_to_storage, scale_from_storage, scale_to_storage


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 0.02, 1.0, 3e4, 1e30])
def test_rounded_scales_are_stored_in_fp16_without_loss(magnitude):
    scale = round_to_storage(torch.rand(1000) * magnitude)
    stored, exponent = scale_to_storage(scale)
    assert stored.dtype == torch.float16
    assert torch.equal(scale_from_storage(stored, exponent), scale)


def test_rounding_keeps_eleven_bits():
    scale = torch.rand(1000) + 0.001
    assert ((round_to_storage(scale) - scale).abs() <= scale * 2.0**-11).all()


@pytest.mark.parametrize("largest", [0.5, 1.0, 0.99999, 1.00001, 32767.99, 32768.0])
def test_storage_at_powers_of_two(largest):
    # The small one is an fp16 subnormal: one exponent too high would lose its last bit.
    scale = round_to_storage(torch.tensor([largest, largest * 1.3e-9]))
    stored, exponent = scale_to_storage(scale)
    assert stored.dtype == torch.float16
    assert torch.equal(scale_from_storage(stored, exponent), scale)


def test_rounding_is_idempotent():
    scale = round_to_storage(torch.rand(1000))
    assert torch.equal(round_to_storage(scale), scale)


@pytest.mark.parametrize("scale", [torch.zeros(3), torch.zeros(0), torch.tensor([0.1, 0.3])])
def test_other_scales_stay_as_they_are(scale):
    stored, exponent = scale_to_storage(scale)
    assert torch.equal(scale_from_storage(stored, exponent), scale)


def test_fp32_scales_stay_fp32():
    stored, exponent = scale_to_storage(torch.tensor([1 / 3]))
    assert (stored.dtype, exponent) == (torch.float32, 0)
