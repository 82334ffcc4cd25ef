"""The held-out check: errors are those of outputs, and a fallback is said."""

import pytest
import torch
from calibration.cases import correlated

from ternc.calibration.guard import Candidate, fell_back, judged
from ternc.calibration.moments import Moments
from ternc.config import Config
from ternc.formats.fit import fit
from ternc.formats.rotation import Rotation
from ternc.runtime import ops


def candidate(method, error, rotation=None):
    return Candidate(method, rotation, None, error, None)


def test_a_fallback_is_said_with_both_errors():
    gptq, als = candidate("gptq", 0.3), candidate("als", 0.2)
    assert "gptq fell back to als" in fell_back(als, [gptq, als])
    assert "0.3" in fell_back(als, [gptq, als]) and "0.2" in fell_back(als, [gptq, als])
    assert fell_back(gptq, [gptq, als]) == ""
    assert fell_back(als, [als]) == ""


@pytest.mark.parametrize("rotation", [None, Rotation(32, 4)])
def test_the_error_is_that_of_the_outputs(rotation):
    ops.register()
    w, x = correlated(6, 32, 300)
    moments = Moments.empty(32, x.device)
    moments.add(x)
    rotated = w if rotation is None else rotation.rotate(w)
    quantized = fit(rotated, 2, Config(planes=2, group_size=16), 0)
    found = judged(w, quantized, "rtn", rotation, moments, centred=False)
    q = quantized.dequantize()
    inputs = x if rotation is None else rotation.rotate(x)
    wanted = (x @ w.T - inputs @ q.T).norm() / (x @ w.T).norm()
    assert found.error == pytest.approx(float(wanted), rel=1e-3)
    torch.testing.assert_close(x @ found.difference.T, x @ w.T - inputs @ q.T, rtol=1e-2, atol=1e-3)
