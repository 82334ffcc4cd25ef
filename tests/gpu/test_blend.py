"""Blends of bit-widths on the GPU: as on the CPU, from any state, moved without compiling."""

from __future__ import annotations

import pytest
import torch
from launches import kernels_of
from torch import nn
from torch._dynamo.utils import counters

import ternc
from ternc.backend import ternc_backend
from ternc.formats.blend import ACTIVATION_BITS, TERNARY, WEIGHT_BITS, values_of
from ternc.train.schedule import BlendState

pytestmark = pytest.mark.gpu

STATES = [(16.0, 8.0, 0.25), (8.0, 4.0, 0.5), (4.0, 2.0, 1.0), (2.0, TERNARY, 0.75)]
STATES += [(TERNARY, TERNARY, 1.0), (16.0, 16.0, 0.0)]


def blend_of(w, state, planes, group_size):
    return torch.ops.ternc.blend_quantize(w, state, list(WEIGHT_BITS), planes, group_size)


def assert_alike(seen, expected):
    """But for few elements near ties, where roundings in another order give another code."""
    assert seen.dtype == expected.dtype
    apart = (seen - expected).abs() > 4 * torch.finfo(seen.dtype).eps * (1 + expected.abs())
    assert apart.float().mean() < 3e-3


@pytest.mark.parametrize(("planes", "group_size"), [(1, 128), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [300, 5000])
def test_weights(planes, group_size, dtype, columns):
    w = torch.randn(33, columns, device="cuda").to(dtype)
    w[5] = 0
    final = torch.ops.ternc.fake_quantize(w, planes, group_size)
    for source, target, share in STATES:
        ends = [final if bits == TERNARY else values_of(w, bits) for bits in (source, target)]
        for device in ("cpu", "cuda"):
            state = torch.tensor([source, target, share], device=device)
            seen = blend_of(w, state, planes, group_size)
            assert_alike(seen, torch.lerp(*ends, share))
        if TERNARY not in (source, target):
            assert_alike(seen.cpu(), blend_of(w.cpu(), state.cpu(), planes, group_size))
    assert torch.equal(blend_of(w, torch.tensor(STATES[4]), planes, group_size), final)


def test_wide_rows():
    """Of a weight and of tokens that sixteen warps do not hold."""
    w = torch.randn(5, 20000, device="cuda", dtype=torch.bfloat16)
    state = torch.tensor(STATES[1], device="cuda")
    assert_alike(blend_of(w, state, 1, 128).cpu(), blend_of(w.cpu(), state.cpu(), 1, 128))
    formats = list(ACTIVATION_BITS)
    seen = torch.ops.ternc.blend_quantize_act(w, state, formats)
    known = torch.ops.ternc.blend_quantize_act(w.cpu(), state.cpu(), formats)
    torch.testing.assert_close(seen.cpu(), known)
    assert kernels_of(lambda: torch.ops.ternc.blend_quantize_act(w, state, formats)) == [
        "blend_rows"
    ]


def test_launches():
    """One for the blend, behind those of the final quantiser where it may be asked for."""
    w = torch.randn(33, 256, device="cuda")
    on_device, on_host = (torch.tensor(STATES[0], device=device) for device in ("cuda", "cpu"))
    seen = kernels_of(lambda: blend_of(w, on_device, 1, 128))
    assert seen == ["blend_rows", "fit_rows", "snap_rows"]
    assert kernels_of(lambda: blend_of(w, on_host, 1, 128)) == ["blend_rows"]
    final = torch.tensor(STATES[4])
    assert kernels_of(lambda: blend_of(w, final, 1, 128)) == ["fit_rows", "snap_rows"]
    formats = list(ACTIVATION_BITS)
    act = torch.ops.ternc.blend_quantize_act
    assert kernels_of(lambda: act(w, on_device, formats)) == ["blend_rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(dtype):
    x = torch.randn(5, 300, device="cuda").to(dtype)
    formats = list(ACTIVATION_BITS)
    for numbers in ((16.0, 8.0, 0.25), (8.0, 4.0, 0.5), (8.0, 8.0, 1.0)):
        for device in ("cpu", "cuda"):
            state = torch.tensor(numbers, device=device)
            seen = torch.ops.ternc.blend_quantize_act(x, state, formats)
            known = torch.ops.ternc.blend_quantize_act(x.cpu(), state.cpu(), formats)
            torch.testing.assert_close(seen.cpu(), known)


def test_gradients_go_straight_through():
    w = torch.randn(8, 256, device="cuda", requires_grad=True)
    grad = torch.randn(8, 256, device="cuda")
    blend_of(w, torch.tensor(STATES[3], device="cuda"), 1, 128).backward(grad)
    assert torch.equal(w.grad, grad)


def test_a_recorded_graph_follows_its_state():
    """Nothing is read on the host: a replay gives what the state asks for then."""
    w, state = torch.randn(33, 256, device="cuda"), torch.tensor(STATES[0], device="cuda")
    blend_of(w, state, 1, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = blend_of(w, state, 1, 128)
    for numbers in STATES:
        state.copy_(torch.tensor(numbers))
        seen.fill_(torch.nan)
        graph.replay()
        assert torch.equal(seen, blend_of(w, state, 1, 128))


def test_the_schedule_of_a_compiled_model_moves_without_compiling():
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).cuda()
    options = {"inner": "aot_eager", "planes": 1}
    fast = torch.compile(model, backend=ternc_backend, options=options)
    x = torch.randn(7, 256, device="cuda")
    outputs = [fast(x).detach()]
    compiled = dict(counters["stats"])
    eight, final = BlendState(8, 8, 1.0), BlendState(TERNARY, TERNARY, 1.0)
    for state in (BlendState(16, 16, 1.0), BlendState(2, TERNARY, 0.5), final):
        for site in ternc.sites(fast):
            site.set_schedule(state, BlendState(16, 16, 1.0) if state.source == 16 else eight)
        y = fast(x)
        y.sum().backward()
        outputs.append(y.detach())
    assert counters["stats"]["unique_graphs"] == compiled["unique_graphs"]
    # Not equal bit for bit where products round to TF32.
    torch.testing.assert_close(outputs[1], model(x).detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(outputs[3], outputs[0])
    away = (outputs[2] - outputs[3]).norm() / outputs[3].norm()
    assert away > 0.05
    assert all(p.grad is not None for p in model.parameters())
