"""Running moments against the plain definition."""

import pytest
import torch

from ternc.calibration.moments import Moments, output_error
from ternc.formats.rotation import Rotation
from ternc.runtime import ops


def collected(rows, parts):
    moments = Moments.empty(rows.shape[1], rows.device)
    for part in rows.split(parts):
        moments.add(part)
    return moments


@pytest.mark.parametrize("part", [1, 7, 50])
def test_moments_are_those_of_all_rows(part):
    rows = torch.randn(50, 6) + 2
    moments = collected(rows, part)
    assert moments.count == 50
    torch.testing.assert_close(moments.second, rows.T @ rows / 50, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    covariance = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(moments.covariance(), covariance, rtol=1e-3, atol=1e-4)


def test_rows_that_are_not_finite_are_left_out():
    rows = torch.randn(10, 4)
    damaged = rows.clone()
    damaged[3, 1], damaged[7, 0] = torch.nan, torch.inf
    kept = torch.ones(10, dtype=torch.bool)
    kept[[3, 7]] = False
    assert collected(damaged, 4).count == 8
    torch.testing.assert_close(collected(damaged, 4).second, collected(rows[kept], 4).second)


def test_rotated_moments_are_those_of_rotated_rows():
    ops.register()
    rows = torch.randn(40, 24) + 1
    rotation = Rotation.of(24, 5)
    wanted = collected(rotation.rotate(rows), 40)
    found = collected(rows, 40).rotated(rotation)
    torch.testing.assert_close(found.second, wanted.second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)


def test_output_error_is_measured_on_outputs():
    rows, w = torch.randn(60, 8), torch.randn(5, 8)
    difference = 0.1 * torch.randn(5, 8)
    wanted = (rows @ difference.T).norm() / (rows @ w.T).norm()
    found = output_error(difference, w, collected(rows, 60).second)
    assert found == pytest.approx(float(wanted), rel=1e-4)
