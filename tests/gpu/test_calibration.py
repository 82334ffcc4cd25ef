"""Calibration on a GPU: recorded loops are the plain ones; a fit is as good as on the CPU."""

import pytest
import torch

from ternc.calibration.fit import Metric, fit
from ternc.calibration.gptq import _columns
from ternc.calibration.moments import Moments
from ternc.calibration.replay import replay
from ternc.config import Config
from ternc.runtime import ops

pytestmark = pytest.mark.gpu


def correlated(rows, columns, tokens):
    generator = torch.Generator().manual_seed(0)
    mix = 0.3 * torch.randn(columns, columns, generator=generator) + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x


@pytest.mark.parametrize("columns, rows", [(128, 40), (7, 3)])
def test_a_recorded_loop_is_the_loop(columns, rows):
    for seed in range(3):  # recorded once, replayed on other values
        generator = torch.Generator("cuda").manual_seed(seed)
        local = torch.randn(columns, rows, generator=generator, device="cuda")
        factor = 0.05 * torch.randn(columns, columns, generator=generator, device="cuda").triu(1)
        factor.diagonal().add_(1.5)
        step = torch.rand(rows, generator=generator, device="cuda") + 0.5
        tensors = (local, factor, step, step)
        wanted = _columns(*(tensor.clone() for tensor in tensors), 4)
        found = replay(_columns, tuple(tensor.clone() for tensor in tensors), 4)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_a_fit_is_as_good_as_on_the_cpu(planes):
    ops.register()
    w, x = correlated(48, 320, 3000)
    losses = []
    for device in ("cpu", "cuda"):
        moments = Moments.empty(320, torch.device(device))
        moments.add(x.to(device))
        metric = Metric.of(moments, False)
        (quantized,) = fit([w.to(device)], metric, planes, Config(planes=planes), "gptq")
        error = x @ (w - quantized.dequantize().cpu()).T
        losses.append(float(error.square().sum() / (x @ w.T).square().sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
