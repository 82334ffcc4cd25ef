"""torch.compile on the GPU: equal results, and CUDA graphs that copy no packed tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ternc
from ternc.backend import ternc_backend

pytestmark = pytest.mark.gpu


def small_model():
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256)]
    return nn.Sequential(*layers).cuda().to(torch.bfloat16).eval()


def copies_in_a_replay(fast, x):
    """Device-to-device copies of one call, after warm-up and recording."""
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            fast(x)
        torch.cuda.synchronize()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fast(x)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("quantize_rows" in name or "gemv" in name for name in names), names
    return sum("Memcpy DtoD" in name for name in names)


@pytest.mark.parametrize("tokens", [1, 16])
def test_quantized_model(tokens):
    torch._dynamo.reset()
    q = ternc.quantize(small_model(), ternc.Config(planes=2))
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = q(x)
        fast = torch.compile(q, mode="reduce-overhead")
        y = fast(x).clone()
    assert torch.equal(y, expected)
    # The input is no static tensor: its copy is the only one.
    assert copies_in_a_replay(fast, x) <= 1


@pytest.mark.parametrize("tokens", [1, 16])
def test_backend(tokens):
    torch._dynamo.reset()
    model = small_model()
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = torch.compile(model, backend=ternc_backend, options={"inner": "eager"})(x)
        torch._dynamo.reset()
        fast = torch.compile(model, backend=ternc_backend, mode="reduce-overhead")
        y = fast(x).clone()
    assert torch.equal(y, eager)
    assert copies_in_a_replay(fast, x) <= 1
