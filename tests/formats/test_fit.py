"""The policy for float weights: plane counts obeyed or chosen, refusals with a reason."""

from __future__ import annotations

import pytest
import torch
from reference import random_quantized

from ternc.config import MAX_IN_FEATURES, Config
from ternc.formats import Refusal, choose

pytestmark = pytest.mark.usefixtures("register_ops")


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group_size", [32, None, "tensor"])
def test_planes_are_obeyed(planes, group_size):
    chosen = choose(torch.randn(40, 100), Config(planes=planes, group_size=group_size))
    unit = {32: "g32", None: "row", "tensor": "tensor"}[group_size]
    assert chosen.describe() == f"ternary x{planes} {unit}"
    assert not chosen.exact


@pytest.mark.parametrize(("budget", "planes"), [(0.5, 1), (0.2, 2), (0.1, 3)])
@pytest.mark.parametrize("rows", [20, 200])
def test_auto_takes_the_fewest_planes_within_the_budget(budget, planes, rows):
    w = torch.randn(rows, 256)
    chosen = choose(w, Config(error_budget=budget))
    assert chosen.planes == planes
    assert chosen.relative_error(w) <= budget


def test_auto_refuses_where_three_planes_are_not_enough():
    refusal = choose(torch.randn(40, 256), Config(error_budget=0.01))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("three planes reach a relative error of 0.06")
    assert refusal.reason.endswith("> error_budget 0.01")


def test_rows_unlike_the_sample_do_not_break_the_budget():
    # The sampled rows (every fourth or so) would fit one plane; the others need more.
    w = torch.randn(200, 64)
    rows = torch.linspace(0, 199, 32).round().long()
    w[rows] = w[rows].sign() * 0.3
    chosen = choose(w, Config(error_budget=0.2))
    assert chosen.planes == 2
    assert chosen.relative_error(w) <= 0.2


def test_refinement_does_not_worsen_the_fit():
    w = torch.randn(40, 256).pow(3)
    for planes in (1, 2, 3):
        config = Config(planes=planes)
        closed, refined = choose(w, config), choose(w, config, refine=8)
        assert refined.relative_error(w) <= closed.relative_error(w) * 1.0005


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_free_scales(planes):
    w = torch.randn(10, 100) * torch.rand(10, 1)
    free = choose(w, Config(planes=planes, group_size=32, tie_scales=False))
    assert free.scale.shape == ((10, 4) if planes == 1 else (10, 4, planes))
    assert free.free_scales and free.planewise == (planes > 1)
    tied = choose(w, Config(planes=planes, group_size=32))
    assert free.relative_error(w) <= tied.relative_error(w) * 1.02
    fitted = choose(w, Config(planes=planes, group_size=32, tie_scales=False), refine=8)
    assert fitted.relative_error(w) <= free.relative_error(w)


def test_planes_of_their_own_follow_weights_that_no_balanced_grid_holds():
    """Two planes whose scales are as 2 to 1."""
    trits = torch.randint(-1, 2, (2, 40, 64)).float()
    scales = torch.tensor([2.0, 1.0])[:, None, None] * (0.5 + torch.rand(40, 64 // 32))[
        :, :, None
    ].expand(-1, -1, 32).flatten(1)
    w = (scales * trits).sum(0)
    free = choose(w, Config(planes=2, group_size=32, tie_scales=False), refine=8)
    tied = choose(w, Config(planes=2, group_size=32), refine=8)
    assert free.relative_error(w) < 0.5 * tied.relative_error(w)
    assert free.scale.argsort(2, descending=True).equal(torch.tensor([0, 1]).expand(40, 2, 2))


def test_group_of_a_whole_row_is_a_row_scale():
    assert choose(torch.randn(8, 64), Config(planes=1, group_size=128)).describe() == (
        "ternary x1 row"
    )


def test_gradient_is_not_needed():
    chosen = choose(torch.randn(8, 64, requires_grad=True), Config(planes=1))
    assert not chosen.scale.requires_grad


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (torch.zeros(3), "not a floating-point matrix"),
        (torch.zeros(3, 4, dtype=torch.int32), "not a floating-point matrix"),
        (torch.tensor([[1.0, torch.nan]]), "1 elements are not finite"),
        (torch.zeros(1, MAX_IN_FEATURES + 4), "in_features=131,076 is over 131,072"),
    ],
)
def test_refusals(w, reason):
    assert reason in choose(w, Config()).reason


def test_a_tied_weight_is_found_again():
    quantized = random_quantized(64, 128, 2)
    chosen = choose(quantized.dequantize(), Config(planes=2, group_size=None), refine=8)
    assert chosen.relative_error(quantized.dequantize()) < 1e-3
