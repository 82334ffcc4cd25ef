"""Time of calls on a GPU: captured back to back in one CUDA graph, so no host time counts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

WARM_CALLS = 3


def graph_time(
    calls: Sequence[Callable[[], object]], budget_ms: float = 20.0, least: int = 5, most: int = 40
) -> float:
    """Median over replays of the microseconds a call, `calls` captured in order in one graph.

    `budget_ms` of replays, between `least` and `most` of them. With weights that rotate through
    more memory than the L2 cache holds, every call reads its weight from memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:WARM_CALLS]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    first = _replay(graph)
    replays = int(max(least, min(most, budget_ms / first)))
    return statistics.median(_replay(graph) for _ in range(replays)) * 1e3 / len(calls)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end), 1e-3)


def rotation(size: int, tensor_bytes: int) -> int:
    """How many copies of a tensor fill `size` bytes; at least 2, at most 96."""
    return max(2, min(96, -(-size // max(tensor_bytes, 1))))
