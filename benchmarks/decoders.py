"""Decoder shapes that people run, with random weights: transformers' own classes and forward.

Linear weights are {-1, 0, 1} times one scale: ternary by value, as a BitNet checkpoint is; or
Gaussian, as a float model's. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SCALE = 0.02


def gpt2_small() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def llama_1b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=22, **sizes, **heads))


def bitnet_2b() -> nn.Module:
    from transformers import BitNetConfig, BitNetForCausalLM

    return BitNetForCausalLM(BitNetConfig(tie_word_embeddings=True))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "gpt2-small": gpt2_small,
    "llama-1.1b": llama_1b,
    "bitnet-2b4t": bitnet_2b,
}


def build(shape: str, dtype: torch.dtype, ternary: bool) -> nn.Module:
    """The model in `dtype`, evaluation mode, without gradients; made in place, no second copy."""
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():  # every weight is written afterwards
            model: Any = SHAPES[shape]()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # a part of the initialisation that is left out
    return fill(model, ternary)


def fill(model: nn.Module, ternary: bool) -> nn.Module:
    """Writes the weights; every product but the head's is ternary, or none."""
    model = model.eval().requires_grad_(False)
    linears = {id(module.weight) for module in model.modules() if is_product(module)}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for parameter in model.parameters():
        if ternary and id(parameter) in linears and parameter is not head.weight:
            parameter.copy_(torch.randint(-1, 2, parameter.shape, dtype=torch.int8)).mul_(SCALE)
        elif parameter.dim() > 1:
            for row in parameter.split(4096):
                row.copy_(torch.randn(row.shape, dtype=torch.float32) * SCALE)
    for module in model.modules():
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if bias is not None:
            bias.zero_()
        if weight is not None and weight.dim() == 1:
            weight.fill_(1.0)
    return model


def prompt(count: int) -> list[int]:
    """Tokens that every process knows."""
    return [(7919 * i + 17) % 1000 for i in range(count)]


def is_product(module: nn.Module) -> bool:
    """A linear, in either spelling of transformers."""
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def product_sizes(model: nn.Module) -> tuple[int, int]:
    """Weights of the layers, weights of the head: multiply-adds of a token."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m.weight for m in model.modules() if is_product(m) and m is not head]
    return sum(math.prod(weight.shape) for weight in layers), math.prod(head.weight.shape)
