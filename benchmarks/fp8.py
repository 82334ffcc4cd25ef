"""x -> fp8 (e4m3) with a scale per row, one Triton kernel: the fp8 peer of the GPU benchmark."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST = 448.0


@triton.jit
def _rows(x_ptr, q_ptr, scale_ptr, K, MOST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30) / MOST
    tl.store(q_ptr + row * K + k, (x / scale).to(tl.float8e4nv), mask=k < K)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (float8_e4m3fn [M, K], scale fp32 [M, 1])."""
    tokens, columns = x.shape
    q = torch.empty((tokens, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 512))
    _rows[(tokens,)](x, q, scale, columns, MOST, block, num_warps=warps)
    return q, scale
