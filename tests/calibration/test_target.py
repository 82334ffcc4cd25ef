"""Targets: the regression of the float output on the inputs of now, where it holds elsewhere."""

import torch
from calibration.cases import correlated

from ternc.calibration.moments import SplitMoments
from ternc.calibration.target import target_of, transfer


def moments_of(x, f):
    split = SplitMoments.empty(x.shape[1], x.device)
    half = len(x) // 2
    split.fitted.add(x[:half], f[:half])
    split.held_out.add(x[half:], f[half:])
    return split


def error(w, f, target, x):
    return float((f @ w.T - x @ target.T).square().mean())


def test_a_systematic_error_of_the_inputs_is_put_right():
    w, f = correlated(6, 24, 4000)
    x = 0.8 * f + 0.05 * torch.randn(f.shape)
    split = moments_of(x, f)
    target = target_of(w, transfer(split, False), split, False)
    assert error(w, f, target.weight, x) < 0.3 * error(w, f, w, x)


def test_a_shift_of_the_mean_goes_into_the_bias():
    w, f = correlated(6, 24, 4000)
    x = 0.9 * f + 2.0 + 0.05 * torch.randn(f.shape)
    split = moments_of(x, f)
    target = target_of(w, transfer(split, True), split, True)
    output = x @ target.weight.T + target.shift
    mean = (f @ w.T - output).mean(0)
    assert mean.abs().max() < 0.1 * (f @ w.T - x @ w.T).mean(0).abs().max()


def test_noise_that_says_nothing_is_not_followed():
    """The error of the inputs is independent of them: on held-out rows no change of W helps."""
    torch.manual_seed(0)
    w, f = torch.randn(6, 64), torch.randn(120, 64)
    x = f.clone()
    split = moments_of(x, f + 0.5 * torch.randn(f.shape))
    target = target_of(w, transfer(split, False), split, False)
    full = w + w @ transfer(split, False)
    moved = float((target.weight - w).norm() / (full - w).norm())
    assert moved < 0.4


def test_without_the_float_inputs_the_target_is_the_weight():
    w, x = correlated(3, 8, 100)
    split = SplitMoments.empty(8, x.device)
    split.fitted.add(x[:50])
    split.held_out.add(x[50:])
    assert transfer(split, True) is None
    target = target_of(w, None, split, True)
    assert target.weight is w and not target.shift.any()
