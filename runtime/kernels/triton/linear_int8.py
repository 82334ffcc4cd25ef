"""y[m, n] = (sum_k q[m, k] W[n, k]) * sx[m] * s[n] + b[n] with W in int8 rows, as out^T = W q^T.

Layout 28: heads and other weights that are kept as int8. One kernel for any number of tokens: up
to 16 it reads the weight once, at the memory's speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ternc.runtime.kernels.triton import launch, quantize_act
from ternc.runtime.kernels.triton.decode import NO_GROUPS
from ternc.runtime.kernels.triton.linear_gemm import Integers
from ternc.runtime.kernels.triton.linear_tile import load_scales, write_tile
from ternc.runtime.kernels.triton.product import Product, segment_of, segment_start

LAYOUT = 28


@triton.jit(do_not_specialize=["M", "tiles_n"])
def gemm_int8(
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
    tiles_n,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One program a tile [BLOCK_N, BLOCK_M] of out^T; tiles of one weight block are neighbours."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n, tile_m = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m
    N = segment_of(rows, rows, tile_n, BLOCK_N)
    n = (tile_n - segment_start(rows, tile_n, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row, token = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    k = tl.arange(0, BLOCK_K)
    weight_ptr = segment_of(weight_ptrs, rows, tile_n, BLOCK_N)
    w_tile = weight_ptr + (row.to(tl.int64) * K)[:, None] + k[None, :]
    q_tile = q_ptr + (token.to(tl.int64) * q_stride)[None, :] + k[:, None]
    if DEPENDENT:
        gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in range(0, K, BLOCK_K):
        if TAIL:
            w = tl.load(w_tile + start, mask=(start + k)[None, :] < K, other=0)
            q = tl.load(q_tile + start, mask=(start + k)[:, None] < K, other=0)
        else:
            w = tl.load(w_tile + start)
            q = tl.load(q_tile + start)
        total = tl.dot(w, q, acc=total, out_dtype=tl.int32)
    if DEPENDENT:
        gdc_launch_dependents()
    scale_ptr = segment_of(scale_ptrs, rows, tile_n, BLOCK_N)
    write_tile(
        total, n, m, N, M, N, tl.load(sx_ptr + token), load_scales(scale_ptr, n, N, ROW_SCALES),
        segment_of(bias_ptrs, rows, tile_n, BLOCK_N), segment_of(y_ptrs, rows, tile_n, BLOCK_N),
        residual_ptr, 0, NO_GROUPS, BIAS, RESIDUAL,
    )  # fmt: skip


def quantize(x: torch.Tensor, bits: int) -> Integers:
    """x [M, K], contiguous -> its integers, rows of 16 bytes."""
    tokens, columns = x.shape
    q = torch.empty((tokens, -(-columns // 16) * 16), dtype=torch.int8, device=x.device)
    sx = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    quantize_act.launch_rows(x, q, sx, bits)
    return Integers(q, sx)


def linear_int8(integers: Integers, product: Product) -> None:
    """integers -> product.outputs: one launch."""
    q, columns, tokens = integers.q, product.weights[0].columns, integers.q.shape[0]
    if tokens <= 16:
        block_n, block_m, block_k, warps, stages = 64, 16, 256, 4, 4
    else:
        block_n, block_m, block_k, warps, stages = 128, 64 if tokens <= 64 else 128, 128, 8, 4
    tiles_n = product.blocks(block_n)
    dependent = launch.dependent_launch(q.device)
    gemm_int8[(tiles_n * triton.cdiv(tokens, block_m),)](
        q_ptr=q,
        sx_ptr=integers.sx,
        **product.pointers(torch.int8),
        M=tokens,
        K=columns,
        q_stride=q.shape[1],
        tiles_n=tiles_n,
        ROW_SCALES=product.weights[0].row_scales,
        BIAS=product.biases is not None,
        RESIDUAL=product.residual is not None,
        TAIL=columns % block_k != 0,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        DEPENDENT=dependent,
        num_warps=warps,
        num_stages=stages,
        launch_pdl=dependent,
        **launch.EXACT,
    )
