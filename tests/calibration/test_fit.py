"""Fits by inputs: order of the methods, the format's limits, agreement with brute force."""

import itertools

import pytest
import torch
from calibration.cases import correlated, output_loss

from ternc.calibration import plane_refit
from ternc.calibration.fit import Metric, fit
from ternc.calibration.gptq import compensate, damped, inverse_factor
from ternc.calibration.grid import Grid
from ternc.calibration.moments import Moments
from ternc.calibration.plane_grid import grid_of
from ternc.calibration.refit import corrected_bias, refit_codes, refit_steps
from ternc.config import CODE_MAX, Config
from ternc.formats import pack, unpack
from ternc.formats.quantized import check_multiplier
from ternc.formats.trits import planes_of
from ternc.runtime import ops

FORMATS = [
    {"group_size": 32},
    {"group_size": 32, "tie_scales": False},
    {"group_size": 40, "tie_scales": False},
    {"group_size": None},
    {"group_size": "tensor"},
    {"group_size": 40},  # the last group is short
]


@pytest.fixture(autouse=True)
def registered():
    ops.register()


def metric_of(x, centred=False):
    moments = Moments.empty(x.shape[1], x.device)
    moments.add(x)
    return Metric.of(moments, centred)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("choices", FORMATS)
def test_gptq_beats_als_on_outputs_and_stays_in_the_format(planes, choices):
    w, x = correlated(24, 96, 1500)
    config, metric = Config(planes=planes, **choices), metric_of(x)
    found = {method: fit([w], metric, planes, config, method)[0] for method in ("als", "gptq")}
    losses = {name: output_loss(w, q.dequantize(), x) for name, q in found.items()}
    assert losses["gptq"] < 0.8 * losses["als"]
    quantized = found["gptq"]
    assert quantized.planes == planes and int(quantized.codes.abs().max()) <= CODE_MAX[planes]
    check_multiplier(quantized)
    assert quantized.free_scales == (not config.tie_scales)
    if config.fit_group != 40:  # lanes hold multiples of 4, like every group here
        assert torch.equal(unpack(pack(quantized, "cpu")).codes, quantized.codes)


@pytest.mark.parametrize("method", ["als", "gptq"])
@pytest.mark.parametrize("choices", FORMATS)
def test_weights_of_one_input_are_fitted_together_as_apart(choices, method):
    w, x = correlated(24, 96, 1500)
    config, metric = Config(planes=2, **choices), metric_of(x)
    parts = list(w.split([5, 12, 7]))
    together = fit(parts, metric, 2, config, method)
    for part, found in zip(parts, together, strict=True):
        (apart,) = fit([part], metric, 2, config, method)
        assert (found.codes == apart.codes).float().mean() > 0.99  # sums may differ in the last bit
        torch.testing.assert_close(found.dequantize(), apart.dequantize(), atol=0.05, rtol=0.05)


def test_sweeps_lower_the_error():
    w, x = correlated(24, 96, 1500)
    config, metric = Config(planes=1, group_size=32), metric_of(x)
    losses = [
        output_loss(w, fit([w], metric, 1, config, "gptq", sweeps)[0].dequantize(), x)
        for sweeps in (0, 1, 8)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_rtn_is_the_closed_form():
    w, x = correlated(8, 64, 200)
    config = Config(planes=2, group_size=32)
    codes, scale, _ = torch.ops.ternc.fit(w, 2, 32, 0)
    found = fit([w], metric_of(x), 2, config, "rtn")[0]
    assert torch.equal(found.codes, codes) and torch.equal(found.scale, scale)


def test_compensation_without_correlation_is_rounding():
    w, _ = correlated(6, 32, 1)
    grid = Grid.of(w, 1, Config(planes=1, group_size=None))
    codes = compensate(w, torch.eye(32), grid)
    assert torch.equal(codes, (w / grid.steps).round().clamp(-1, 1))


def test_compensation_is_the_column_by_column_definition():
    """Frantar et al., algorithm 1, with the inverse itself shrunk after every column."""
    w, x = correlated(5, 12, 300)
    hessian = damped(x.T @ x / 300, 0.01)
    grid = Grid.of(w, 2, Config(planes=2, group_size=None))
    codes = compensate(w, inverse_factor(hessian), grid)
    left, inverse = w.double().clone(), torch.linalg.inv(hessian.double())
    step = grid.steps[:, 0].double()
    for j in range(12):
        code = (left[:, j] / step).round().clamp(-4, 4)
        assert torch.equal(code.float(), codes[:, j]), f"column {j}"
        error = (left[:, j] - code * step) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def test_code_sweeps_reach_a_point_no_single_code_improves():
    w, x = correlated(4, 16, 300)
    hessian = damped(x.T @ x / 300, 0.01)
    grid = Grid.of(w, 1, Config(planes=1, group_size=None))
    codes = compensate(w, inverse_factor(hessian), grid)
    for _ in range(30):
        codes = refit_codes(w, codes, hessian, grid)

    def errors(c):
        difference = w - c * grid.expanded()
        return ((difference @ hessian) * difference).sum(1)

    best = errors(codes)
    for j, value in itertools.product(range(16), (-1.0, 0.0, 1.0)):
        trial = codes.clone()
        trial[:, j] = value
        assert (errors(trial) >= best - 1e-6 * best).all()


@pytest.mark.parametrize("choices", FORMATS)
def test_step_refits_lower_the_error(choices):
    w, x = correlated(9, 96, 800)
    hessian, config = damped(x.T @ x / 800, 0.01), Config(planes=2, **choices)
    grid = Grid.of(w, 2, config)
    codes = compensate(w, inverse_factor(hessian), grid)
    if grid.group_size > 0 and config.tie_scales:
        grid.tie(torch.ones_like(grid.steps))
    before = output_loss(w, codes * grid.expanded(), x)
    refit_steps(w @ hessian, codes, hessian, grid)
    assert output_loss(w, codes * grid.expanded(), x) <= before
    if grid.scale is not None:
        assert (grid.multiplier() >= 1).all() and (grid.multiplier() <= grid.most).all()


def test_free_steps_are_the_least_squares_solution():
    w, x = correlated(3, 8, 400)
    hessian = x.T @ x / 400
    grid = Grid.of(w, 3, Config(planes=3, group_size=4, tie_scales=False))
    codes = compensate(w, inverse_factor(damped(hessian, 0.01)), grid)
    refit_steps(w @ hessian, codes, hessian, grid)
    for row in range(3):
        basis = torch.zeros(8, 2)
        basis[:4, 0], basis[4:, 1] = codes[row, :4], codes[row, 4:]
        wanted = torch.linalg.lstsq(x @ basis, x @ w[row]).solution
        torch.testing.assert_close(grid.steps[row], wanted, rtol=1e-3, atol=1e-5)


def test_dead_and_constant_columns():
    w, x = correlated(6, 32, 200)
    x[:, 3], x[:, 4] = 0.0, 1.0
    w[2] = 0.0
    for centred in (False, True):
        found = fit([w], metric_of(x, centred), 2, Config(planes=2, group_size=16), "gptq")[0]
        assert found.dequantize().isfinite().all()
        assert not found.dequantize()[2].any()


def test_bias_takes_up_the_mean_error():
    w, x = correlated(6, 32, 500)
    x = x + 3
    q = fit([w], metric_of(x, centred=True), 1, Config(planes=1, group_size=16), "gptq")[0]
    bias = torch.randn(6)
    corrected = corrected_bias(bias, w - q.dequantize(), x.mean(0))
    output = x @ q.dequantize().T + corrected
    torch.testing.assert_close(output.mean(0), (x @ w.T + bias).mean(0), rtol=1e-3, atol=1e-3)


def test_scales_of_planes_and_codes_end_at_a_local_optimum():
    """The scales are the least squares of the codes, and no single code improves a row."""
    w, x = correlated(4, 12, 400)
    hessian = damped(x.T @ x / 400, 0.01)
    config = Config(planes=2, group_size=8, tie_scales=False)  # the last group is short
    grid = grid_of(w, 2, config)
    codes = compensate(w, inverse_factor(hessian), grid)

    def errors(c):
        difference = w - grid.values(c)
        return ((difference @ hessian) * difference).sum(1)

    before = errors(codes)
    plane_refit.refit_scales(w @ hessian, codes, hessian, grid)
    refitted = errors(codes)
    assert (refitted <= before * (1 + 1e-5)).all() and (refitted < before).any()
    lower = torch.linalg.cholesky(hessian.double())
    for row in range(4):
        trits = planes_of(codes[row : row + 1], 2)[:, 0].double()
        basis = torch.zeros(12, 4, dtype=torch.float64)
        basis[:8, :2], basis[8:, 2:] = trits[:, :8].T, trits[:, 8:].T
        wanted = torch.linalg.lstsq(lower.T @ basis, lower.T @ w[row].double()).solution
        if (wanted > 0).all():
            torch.testing.assert_close(
                grid.scales[row].flatten().double(), wanted, rtol=1e-3, atol=1e-4
            )
    for _ in range(30):
        codes = plane_refit.refit_codes(w, codes, hessian, grid)
    best = errors(codes)
    assert (best <= refitted * (1 + 1e-5)).all()
    for j, value in itertools.product(range(12), range(-4, 5)):
        trial = codes.clone()
        trial[:, j] = value
        assert (errors(trial) >= best * (1 - 1e-5)).all()


def test_rows_that_are_infinite_in_the_float_model_alone_are_left_out():
    """Of half precision too, in which the bound itself is infinite."""
    wanted = torch.randn(4, 8).half()
    wanted[1, 2] = float("inf")
    moments = Moments.empty(8, wanted.device)
    moments.add(torch.randn(4, 8), wanted)
    assert (moments.count, moments.left_out) == (3, 1)
    assert moments.lag is not None and bool(moments.lag.isfinite().all())
