"""A decoder block on the GPU: few launches, no copies, equal to the graph run op by op."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from launches import kernels_of
from torch import nn

import ternc
from ternc.backend import ternc_backend

pytestmark = pytest.mark.gpu

WIDTH, HIDDEN, HEADS = 512, 1408, 8


class Block(nn.Module):
    """RMSNorm, attention over itself, RMSNorm, gated perceptron."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        h = self.norms[0](x)
        heads = [
            p(h).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for p in (self.q, self.k, self.v)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        h = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_launches_of_a_block(tokens, rotation):
    torch._dynamo.reset()
    block = Block().cuda().to(torch.bfloat16).eval()
    q = ternc.quantize(block, ternc.Config(planes=1, rotation=rotation))
    x = torch.randn(1, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = q(x)
        fast = torch.compile(q, backend=ternc_backend, mode="reduce-overhead")
        for _ in range(3):
            y = fast(x).clone()
        error = (y - expected).float().norm() / expected.float().norm()
        assert error < 0.02
        torch._dynamo.reset()
        fast = torch.compile(q, backend=ternc_backend)
        kernels = collections.Counter(kernels_of(lambda: fast(x)))
    product = "gemv" if tokens == 1 else "gemm"
    assert kernels[product] == 4, kernels
    fills = sum(n for name, n in kernels.items() if "Memset" in name or "fill" in name.lower())
    # cuDNN's attention, where torch takes it, clears a workspace of its own.
    assert fills <= sum(n for name, n in kernels.items() if "cudnn" in name), kernels
    if rotation == "none":
        assert kernels["norm_rows"] == (0 if tokens == 1 else 2), kernels
        assert kernels["activation_rows"] == (0 if tokens == 1 else 1), kernels


@pytest.mark.parametrize("tokens", [1, 7])
def test_chain_of_fused_kernels_in_a_graph(tokens):
    """Norm, products, activation, product and residual, directly one behind the other."""
    from ternc.runtime.kernels.triton import launch

    block = Block().cuda().to(torch.bfloat16).eval()
    layers = [ternc.quantize(block, ternc.Config(planes=1, rotation="none")) for _ in range(3)]

    def arguments(modules):
        none = torch.empty(0, device="cuda")
        return (
            [m.packed_weight for m in modules],
            [m.scale for m in modules],
            [none.byte() if m.multiplier is None else m.multiplier for m in modules],
            [none for _ in modules],
            [m.out_features for m in modules],
            [m.group_size for m in modules],
            8,
            [m.layout for m in modules],
            torch.bfloat16,
        )

    library = torch.ops.ternc

    def run(x):
        for layer in layers * 4:
            pair = [layer.gate_proj, layer.up_proj]
            _, q, sx = library.norm_quantize(
                x, None, None, "rms", 1e-5, 0.0, False, None, 0, 8, False
            )
            gate, up = library.linears2(q, sx, *arguments(pair))
            q, sx = library.activate_quantize(gate, up, "silu", None, 128, 8)
            down = layer.down_proj
            tensors = (down.packed_weight, down.scale, down.multiplier, None, x)
            numbers = (WIDTH, down.group_size, 8, down.layout, torch.bfloat16)
            x = library.linears1(q, sx, *tensors, *numbers)
        return x

    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    run(x)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        with launch.alone():
            expected = run(x)
        assert torch.equal(run(x), expected)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
