"""hadamard(x, signs) -> (x * signs) blockdiag(H_b) / sqrt(b): the rotation of the format.

H_b is the Sylvester matrix of size b; blocks are contiguous runs of b columns. The transform
without signs is its own inverse.
"""

from __future__ import annotations

from typing import Any

import torch

from ternc.errors import KernelError
from ternc.runtime.ops.definition import FLOAT_TYPES, OpDefinition

MAX_BLOCK = 4096


def check_hadamard(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> None:
    """Raise KernelError for what no kernel takes."""
    if x.dtype not in FLOAT_TYPES:
        raise KernelError(f"ternc::hadamard: x is {x.dtype}, not float32, bfloat16 or float16")
    if x.dim() == 0 or block < 1 or block > MAX_BLOCK or block & (block - 1):
        raise KernelError(f"ternc::hadamard: block={block} is not a power of two up to {MAX_BLOCK}")
    if x.shape[-1] % block:
        raise KernelError(f"ternc::hadamard: block={block} does not divide width {x.shape[-1]}")
    if signs is not None and (signs.dtype != torch.int8 or signs.numel() != x.shape[-1]):
        raise KernelError(
            f"ternc::hadamard: signs are {signs.dtype} {list(signs.shape)}, "
            f"not int8 [{x.shape[-1]}] of +1 and -1"
        )


def transform(x: torch.Tensor, block: int) -> torch.Tensor:
    """fp32 [..., K] -> x blockdiag(H_b) / sqrt(b), by log2(b) rounds of sums and differences."""
    shape = x.shape
    x = x.reshape(-1, block)
    half = 1
    while half < block:
        pairs = x.view(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), 2).view(-1, block)
        half *= 2
    return (x * block**-0.5).reshape(shape)


def reference(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> torch.Tensor:
    """x [..., K] fp32, bf16 or fp16, signs int8 [K] of +1 and -1 or None -> [..., K] in x.dtype.

    Sums in fp32, one rounding to x.dtype.
    """
    check_hadamard(x, signs, block)
    values = x.float() if signs is None else x.float() * signs
    return transform(values, block).to(x.dtype)


def fake(x: torch.Tensor, signs: torch.Tensor | None, block: int) -> torch.Tensor:
    check_hadamard(x, signs, block)
    return x.new_empty(x.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, signs, ctx.block = inputs
    ctx.save_for_backward(signs)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """The transform is symmetric and orthogonal: d/dx = H grad, then the signs."""
    (signs,) = ctx.saved_tensors
    rotated = torch.ops.ternc.hadamard(grad, None, ctx.block)
    return (rotated if signs is None else rotated * signs.to(grad.dtype)), None, None


HADAMARD = OpDefinition(
    name="hadamard",
    schema="(Tensor x, Tensor? signs, int block) -> Tensor",
    reference=reference,
    fake=fake,
    setup_context=setup_context,
    backward=backward,
)
