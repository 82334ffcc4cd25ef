"""y[m, n] = (sum over groups, ascending, of float(sum_g) * s[n, g]) * sx[m] + b[n]: free scales.

An int32 sum in every group, fp32 over groups; groups of any size. Simple, not tuned: imported
group-scaled checkpoints run on it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch
from ternc.runtime.kernels.triton.linear_gemm import Integers
from ternc.runtime.kernels.triton.product import (
    Product,
    rounded_sum,
    segment_of,
    segment_start,
)

BLOCK_N = 64
BLOCK_K = 64


@triton.jit
def load_codes(row_ptr, column, inside, PLANES: tl.constexpr):
    """Codes int8 [n, k] of columns [1, k] of rows whose first bytes row_ptr [n, 1] points at."""
    CHUNK_BYTES: tl.constexpr = 64 * PLANES if PLANES < 3 else 160
    field, k = column % 256 // 64, column % 64
    start = row_ptr + column // 256 * CHUNK_BYTES
    if PLANES == 1:
        # The field is moved to the top of the byte, then back with its sign.
        code = (tl.load(start + k, mask=inside, other=0) << (6 - 2 * field).to(tl.int8)) >> 6
    else:
        nibble = tl.load(start + 64 * (field // 2) + k, mask=inside, other=0)
        code = (nibble << (4 - 4 * (field % 2)).to(tl.int8)) >> 4
        if PLANES == 3:
            low = tl.load(start + 128 + k % 32, mask=inside, other=0)
            code = 2 * code + ((low >> (2 * field + k // 32).to(tl.int8)) & 1)
    return code


@triton.jit(do_not_specialize=["M", "groups", "group_size"])
def gemm_free(
    q_ptr,
    sx_ptr,
    weight_ptrs,
    scale_ptrs,
    multiplier_ptrs,
    bias_ptrs,
    y_ptrs,
    residual_ptr,
    rows,
    M,
    K,
    q_stride,
    row_bytes,
    groups,
    group_size,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a tile [BLOCK_M, BLOCK_N] of y."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    N = segment_of(rows, rows, tile_n, BLOCK_N)
    n = (tile_n - segment_start(rows, tile_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, token = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    weight_row = segment_of(weight_ptrs, rows, tile_n, BLOCK_N)
    weight_row = weight_row + (row.to(tl.int64) * row_bytes)[:, None]
    scale_row = segment_of(scale_ptrs, rows, tile_n, BLOCK_N) + row.to(tl.int64) * groups
    q_row = q_ptr + (token.to(tl.int64) * q_stride)[:, None]
    place = tl.arange(0, BLOCK_K)
    if DEPENDENT:
        gdc_wait()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(groups):
        end = tl.minimum((group + 1) * group_size, K)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in range(group * group_size, end, BLOCK_K):
            k = (start + place)[None, :]
            q = tl.load(q_row + k, mask=k < end, other=0)
            codes = load_codes(weight_row, k, k < end, PLANES)
            sums = tl.dot(q, tl.trans(codes), acc=sums, out_dtype=tl.int32)
        total += sums.to(tl.float32) * tl.load(scale_row + group)[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
    y = total * tl.load(sx_ptr + token)[:, None]
    if BIAS:
        bias_ptr = segment_of(bias_ptrs, rows, tile_n, BLOCK_N)
        y = y + tl.load(bias_ptr + row).to(tl.float32)[None, :]
    stored = (m[:, None] < M) & (n[None, :] < N)
    y_ptr = segment_of(y_ptrs, rows, tile_n, BLOCK_N)
    out = (m.to(tl.int64) * N)[:, None] + n[None, :]
    if RESIDUAL:
        y = rounded_sum(y, tl.load(residual_ptr + out, mask=stored, other=0.0))
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=stored)


def linear_free(integers: Integers, product: Product) -> None:
    """integers -> product.outputs: one launch."""
    q, weight, tokens = integers.q, product.weights[0], integers.q.shape[0]
    block_m = 16 if tokens <= 16 else 64
    dependent = launch.dependent_launch(q.device)
    gemm_free[(product.blocks(BLOCK_N) * triton.cdiv(tokens, block_m),)](
        q_ptr=q,
        sx_ptr=integers.sx,
        **product.pointers(q.dtype),
        M=tokens,
        K=weight.columns,
        q_stride=q.shape[1],
        row_bytes=weight.row_bytes,
        groups=weight.groups,
        group_size=weight.group_size,
        PLANES=weight.planes,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_M=block_m,
        BLOCK_K=BLOCK_K,
        DEPENDENT=dependent,
        num_warps=4,
        num_stages=2,
        launch_pdl=dependent,
        **launch.EXACT,
    )
