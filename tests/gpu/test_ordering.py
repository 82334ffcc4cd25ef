"""Chains of dependent kernels: programmatic launch, CUDA graphs, repacking, no hidden work."""

from __future__ import annotations

import pytest
import torch
from launches import kernels_of
from packed_weights import assert_same, packed_on_gpu
from reference import linear_arguments

from ternc.runtime.ops import linear as linear_op

pytestmark = pytest.mark.gpu

DEPTH = 24


def chain(x, weights):
    """Every layer reads what the one before wrote; the RMS keeps magnitudes near 1."""
    for packed in weights:
        x = torch.ops.ternc.linear(*linear_arguments(x, packed))
        x = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
    return x


def bare_chain(x, weights):
    """Nothing but our kernels, directly one behind the other."""
    for packed in weights:
        x = torch.ops.ternc.linear(*linear_arguments(x, packed))
    return x


def narrow_weights(columns, depth=DEPTH):
    """Square weights whose scales keep the magnitude of random inputs."""
    weights = [packed_on_gpu(columns, columns, 1) for _ in range(depth)]
    for packed in weights:
        packed.scale.fill_((1.5 / columns) ** 0.5)
    return weights


@pytest.mark.parametrize("tokens", [1, 2, 16, 100])
@pytest.mark.parametrize("columns", [512, 2560])
def test_chain_in_a_graph(tokens, columns):
    weights = narrow_weights(columns)
    for run in (chain, bare_chain):
        check_graph(run, weights, tokens, columns)


def check_graph(run, weights, tokens, columns):
    """Overlapping, alone and replayed, a chain gives the same."""
    from ternc.runtime.kernels.triton import launch

    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    run(x, weights)
    run(x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weights)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        with launch.alone():
            expected = run(x, weights)
        assert_same(run(x, weights), expected)
        y.fill_(torch.nan)
        graph.replay()
        assert_same(y, expected)


def test_chain_against_the_reference():
    weights = narrow_weights(512)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    y = bare_chain(x, weights)
    for packed in weights:
        x = linear_op.reference(*linear_arguments(x, packed))
    assert_same(y, x)


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_weight_written_just_before_is_seen(tokens):
    """The one-token kernel reads weights before it waits, but never freshly written ones."""
    old, new = packed_on_gpu(8192, 4096, 1), packed_on_gpu(8192, 4096, 1)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(10):
        torch.ops.ternc.linear(*linear_arguments(x, old))
        previous = old.weight.clone()
        expected = linear_op.reference(*linear_arguments(x, new))[:, :64]
        torch.cuda.synchronize()
        old.weight.copy_(new.weight)
        old.scale.copy_(new.scale)
        y = torch.ops.ternc.linear(*linear_arguments(x, old))
        assert_same(y[:, :64], expected)
        new.weight.copy_(previous)


def test_stable_follows_versions():
    from ternc.runtime.kernels.triton import launch

    packed = packed_on_gpu(64, 256, 1, 128)
    assert not launch.stable(packed.weight, packed.multiplier)
    assert launch.stable(packed.weight, packed.multiplier)
    packed.multiplier.copy_(packed.multiplier.clone())
    assert not launch.stable(packed.weight, packed.multiplier)
    assert launch.stable(packed.weight, packed.multiplier)
    packed.weight.copy_(packed.weight.clone())
    assert not launch.stable(packed.weight, packed.multiplier)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, ["gemv"]), (8, ["gemm", "quantize_rows"]), (300, ["gemm", "quantize_rows"])],
)
def test_no_hidden_launches(tokens, expected):
    """One kernel for a token, two for more: nothing is zero-filled, split K included."""
    packed = packed_on_gpu(1024, 4096, 1)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    assert kernels_of(lambda: torch.ops.ternc.linear(*linear_arguments(x, packed))) == expected


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_no_host_synchronisation(tokens):
    packed = packed_on_gpu(1024, 4096, 1)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    torch.ops.ternc.linear(*linear_arguments(x, packed))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.ternc.linear(*linear_arguments(x, packed))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams_at_once():
    """Split K keeps its counters in the call's own workspace."""
    packed = packed_on_gpu(1024, 8192, 1)
    inputs = [torch.randn(8, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [linear_op.reference(*linear_arguments(x, packed)) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(50):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(torch.ops.ternc.linear(*linear_arguments(x, packed)))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert_same(y, expected[i % 2])
