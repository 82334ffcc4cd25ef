"""Packed modules that move to the GPU and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ternc.config import Config
from ternc.formats import layouts
from ternc.modules.linear import TernaryLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_moves_between_devices_change_the_layout_alone(planes):
    layer = TernaryLinear.from_linear(nn.Linear(130, 48), Config(planes=planes, group_size=64))
    before = copy.deepcopy(layer)
    state = before.state_dict()
    layer.cuda()
    assert layer.layout == layouts.resident_layout(planes, "cuda")
    assert layer.packed_weight.is_cuda and layer.scale.is_cuda and layer.multiplier.is_cuda
    assert torch.equal(layer.weight.cpu(), before.weight)
    assert all(torch.equal(v.cpu(), state[name]) for name, v in layer.state_dict().items())
    layer.load_state_dict(state)
    assert layer.packed_weight.is_cuda
    layer.cpu()
    assert layer.layout == before.layout
    for name in ("packed_weight", "scale", "multiplier"):
        assert torch.equal(getattr(layer, name), getattr(before, name)), name
