"""y[m, n] = (sum_k x[m, k] W[n, k]) * s[n] + b[n] with x in floating point, accumulated in fp32.

Codes times multipliers are at most 127: exact in fp16 and bf16. A row of x with NaN or infinity
gives a NaN row, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.decode import NO_GROUPS, SHIFTS, load_chunk
from ternc.runtime.kernels.triton.quantize_act import INFINITY_BITS, magnitude_bits
from ternc.runtime.kernels.triton.weight import Weight

BLOCK_N = 64


@triton.jit(do_not_specialize=["M", "chunks", "groups", "group_size"])
def gemm_float(
    x_ptr,
    weight_ptr,
    scale_ptr,
    multiplier_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    chunks,
    groups,
    group_size,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES_A_GROUP: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program a tile [BLOCK_M, BLOCK_N] of y."""
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    SHIFT: tl.constexpr = SHIFTS[PLANES]
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.where(m < M, m, tl.minimum(m - M, M - 1))
    row = tl.where(n < N, n, tl.minimum(n - N, N - 1))
    k = tl.arange(0, 256)
    weight_row = weight_ptr + (row.to(tl.int64) * (chunks * CHUNK_BYTES))[:, None]
    multiplier_row = multiplier_ptr + (row.to(tl.int64) * groups)[:, None]
    x_tile = x_ptr + (token.to(tl.int64) * K)[:, None] + k[None, :]
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_M], tl.int32)
    for chunk in range(chunks):
        x = tl.load(x_tile + chunk * 256, mask=(chunk * 256 + k)[None, :] < K, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude_bits(x.to(tl.float32)), axis=1))
        w = load_chunk(
            weight_row, multiplier_row, chunk, groups, group_size, PLANES, GROUPS,
            HALVES_A_GROUP, ASM,
        )  # fmt: skip
        total = tl.dot(x, tl.trans(w.to(x.dtype)), acc=total, input_precision="ieee")
    if GROUPS == NO_GROUPS:
        total = total * (1.0 / (1 << SHIFT))
    y = total * tl.load(scale_ptr + (row if ROW_SCALES else row * 0))[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row).to(tl.float32)[None, :]
    y = tl.where((largest < INFINITY_BITS)[:, None], y, float("nan"))
    out = y_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def linear_float(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], contiguous -> y [M, N] in x.dtype: one launch."""
    tokens = x.shape[0]
    wide = 32 if x.dtype == torch.float32 else 64
    block_m = 16 if tokens <= 16 else wide
    y = torch.empty((tokens, weight.rows), dtype=x.dtype, device=x.device)
    dependent = launch.dependent_launch(x.device)
    gemm_float[(triton.cdiv(tokens, block_m) * triton.cdiv(weight.rows, BLOCK_N),)](
        x,
        weight.bytes,
        weight.scale,
        weight.multiplier_or(weight.scale),
        x if bias is None else bias,
        y,
        tokens,
        weight.rows,
        weight.columns,
        weight.chunks,
        weight.groups,
        weight.group_size,
        PLANES=weight.planes,
        GROUPS=weight.groups_kind,
        HALVES_A_GROUP=weight.halves_a_group,
        ROW_SCALES=weight.row_scales,
        BIAS=bias is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_M=block_m,
        DEPENDENT=dependent,
        ASM=launch.INLINE_ASM,
        num_warps=4,
        num_stages=2,
        launch_pdl=dependent,
        **launch.EXACT,
    )
    return y
