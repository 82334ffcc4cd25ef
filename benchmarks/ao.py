"""torchao's public routes on the CPU: int8 activations and weights two ways, and int4 weights.

A compiled route with frozen weights is one graph over a stack of layers, so that a call is as many
products as there are copies of the weight; the int4 kernel is one call from eager torch, in
bfloat16 (its fp32 is 80 times slower, and compiling saves nothing).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable

import common
import torch
from torch import nn

STACKED = 64 << 20
"""Bytes of weight in one compiled graph, at least: beyond the caches, and quick to compile."""
GROUP = 128
ERROR = {"int8": 0.03, "int8 pt2e": 0.03, "int4": 0.15}
"""Largest relative error on Gaussian weights."""


class Stack(nn.Module):
    """One input through `count` linears of random weights [rows, columns]."""

    def __init__(self, rows: int, columns: int, count: int) -> None:
        super().__init__()
        new = functools.partial(nn.Linear, columns, rows, bias=False)
        self.layers = nn.ModuleList(new() for _ in range(count))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def linear(kind: str, rows: int, x: torch.Tensor, hot: bool) -> common.Contender | str:
    """The kind of ERROR, checked against fp32; what is missing where torchao is."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if kind == "int4" and (x.shape[1] % GROUP or rows % 32):
        return f"a shape of no {GROUP} columns and 32 rows"
    nbytes = rows * x.shape[1] // (2 if kind == "int4" else 1)
    copies = 1 if hot else common.copies_of(nbytes)
    if kind != "int4":
        copies = min(copies, 1 + STACKED // nbytes)
    layers = 1 if kind == "int4" else copies  # int4 is packed once and then copied
    stack = Stack(rows, x.shape[1], layers).eval().requires_grad_(False)
    exact = stack.layers[0](x)
    with _quiet(), torch.no_grad():
        run = ROUTES[kind](stack, x, copies)
        seen = run(0)
    assert (seen.float() - exact).norm() <= ERROR[kind] * exact.norm()
    if kind == "int4":
        nbytes += rows * (x.shape[1] // GROUP) * 4
        return common.Contender("torchao int4, bf16", run, copies, nbytes)
    return common.Contender(f"torchao {kind}", run, 1, nbytes, products=copies)


def _int8(stack: Stack, x: torch.Tensor, _: int) -> Callable[[int], torch.Tensor]:
    from torchao import quantization

    quantization.quantize_(stack, quantization.Int8DynamicActivationInt8WeightConfig())
    return _frozen(stack, x)


def _int8_pt2e(stack: Stack, x: torch.Tensor, _: int) -> Callable[[int], torch.Tensor]:
    """Exported, annotated for x86, compiled to oneDNN's qlinear."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    prepared = quantize_pt2e.prepare_pt2e(torch.export.export(stack, (x,)).module(), quantizer)
    prepared(x)
    return _frozen(quantize_pt2e.convert_pt2e(prepared), x)


def _int4(stack: Stack, x: torch.Tensor, copies: int) -> Callable[[int], torch.Tensor]:
    from torchao import quantization
    from torchao.prototype.quantization.int4 import inference_workflow

    quantization.quantize_(
        stack.bfloat16(), inference_workflow.PrototypeInt4WeightOnlyConfig(group_size=GROUP)
    )
    x = x.bfloat16()
    layers = [copy.deepcopy(stack.layers[0]) for _ in range(copies)]
    return lambda i: layers[i](x)


def _frozen(stack: nn.Module, x: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Compiled by Inductor with the weights as constants; the result of the first layer."""
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(stack, dynamic=False, fullgraph=True)
        compiled(x)
    return lambda _: compiled(x)[0]


class _quiet(warnings.catch_warnings):
    """Without what torchao and Inductor say about themselves."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torchao").setLevel(logging.ERROR)


ROUTES = {"int8": _int8, "int8 pt2e": _int8_pt2e, "int4": _int4}
