"""What else multiplies a weight on the CPU: torch in fp32 and bf16, oneDNN's int8, torchao, ggml.

Each is (rows, x [M, K], hot) -> Contender, or why it is not here or does not take the shape.
ggml's shared libraries are those of llama-cpp-python, or of the folder $GGML_LIB_DIR.
"""

from __future__ import annotations

import ao
import common
import ggml
import torch
import torch.nn.functional as F


def copies_of(nbytes: int, hot: bool) -> int:
    return 1 if hot else common.copies_of(nbytes)


def linear(dtype: torch.dtype, rows: int, x: torch.Tensor, hot: bool) -> common.Contender:
    """F.linear in one dtype."""
    nbytes = rows * x.shape[1] * dtype.itemsize
    weights = [torch.randn(rows, x.shape[1]).to(dtype) for _ in range(copies_of(nbytes, hot))]
    x = x.to(dtype)
    name = f"F.linear {str(dtype).removeprefix('torch.')}"
    return common.Contender(name, lambda i: F.linear(x, weights[i]), len(weights), nbytes)


def onednn_int8(rows: int, x: torch.Tensor, hot: bool) -> common.Contender | str:
    """oneDNN's prepacked int8 linear with per-tensor quantisation of x in eager torch."""
    if not hasattr(torch.ops, "onednn") or not torch.backends.mkldnn.is_available():
        return "torch without oneDNN"
    columns = x.shape[1]
    w = torch.randn(rows, columns)
    scale = w.abs().amax(1) / 127
    codes = (w / scale[:, None]).round().to(torch.int8)
    zeros = torch.zeros(rows, dtype=torch.int32)
    count = copies_of(rows * columns, hot)
    weights = [torch.ops.onednn.qlinear_prepack(codes, list(x.shape)) for _ in range(count)]

    def run(i: int) -> torch.Tensor:
        step = float(x.abs().max()) / 127
        q = torch.quantize_per_tensor(x, step, 128, torch.quint8).int_repr()
        return torch.ops.onednn.qlinear_pointwise(
            q, step, 128, weights[i], scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    exact = x @ w.T
    assert (run(0) - exact).norm() <= 0.03 * exact.norm()
    return common.Contender("oneDNN int8", run, count, rows * columns)


ALL = {
    "fp32": lambda rows, x, hot: linear(torch.float32, rows, x, hot),
    "bf16": lambda rows, x, hot: linear(torch.bfloat16, rows, x, hot),
    "onednn": onednn_int8,
    "torchao_int8": lambda rows, x, hot: ao.linear("int8", rows, x, hot),
    "torchao_pt2e": lambda rows, x, hot: ao.linear("int8 pt2e", rows, x, hot),
    "torchao_int4": lambda rows, x, hot: ao.linear("int4", rows, x, hot),
    "tq2_0": lambda rows, x, hot: ggml.linear("TQ2_0", rows, x, hot),
    "tq1_0": lambda rows, x, hot: ggml.linear("TQ1_0", rows, x, hot),
    "q4_0": lambda rows, x, hot: ggml.linear("Q4_0", rows, x, hot),
}
