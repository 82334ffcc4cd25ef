"""Layers with the names and arguments of the `bitlinear` package.

    BitLinear            -> pack() -> PackedBitLinear            one plane, a scale a row
    MultiTernaryLinear   -> pack() -> PackedMultiTernaryLinear   k planes

The first of each trains a master weight, straight through; the second holds packed bytes alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ternc
from ternc.bitlinear.functional import balanced_parts, trit_planes
from ternc.config import Config
from ternc.errors import ConfigError
from ternc.formats import layouts
from ternc.formats.packed import to_layout
from ternc.formats.quantized import Quantized
from ternc.modules import at_rest
from ternc.modules.conversion import carry_over
from ternc.modules.linear import TernaryLinear
from ternc.runtime import ops
from ternc.train.linear import QATLinear, SiteSettings

CONFIG = Config(planes=1, group_size=None, activation_bits=None)
"""One scale a row, activations in floating point: y = (x W_ternary^T) gamma + b."""


class BitLinear(QATLinear):
    """y = (x W_ternary^T) gamma + b, W_ternary and gamma fitted to the trainable `weight`.

    Args:
        activation_bits: 8 or 4 for per-token integer inputs; None leaves them floating point.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation_bits: int | None = None,
    ) -> None:
        made = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        config = Config(planes=1, group_size=None, activation_bits=activation_bits)
        settings = SiteSettings(1, 0, activation_bits=config.op_activation_bits)
        weight = nn.Parameter(made.weight.detach())
        super().__init__(weight, made.bias, settings, config=config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation_bits: int | None = None) -> BitLinear:
        """The layer that starts from the weights of `linear`, copied."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            linear.weight.device,
            linear.weight.dtype,
            activation_bits=activation_bits,
        )
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if linear.bias is not None and layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @property
    def W_ternary(self) -> torch.Tensor:
        """Trits [out, in] in {-1, 0, 1}, in the dtype of the weight."""
        return self.quantized().codes.to(self.weight.dtype)

    @property
    def gamma(self) -> torch.Tensor:
        """Scale of every row [out]."""
        return self.quantized().scale.to(self.weight.dtype)

    def pack(self) -> PackedBitLinear:
        """The same layer with packed bytes in the place of the master weight."""
        layer = PackedBitLinear.from_quantized(
            self.quantized(), self.bias, config=self.config, weight_dtype=self.weight.dtype
        )
        assert isinstance(layer, PackedBitLinear)
        carry_over(self, layer)
        return layer


class PackedBitLinear(TernaryLinear):
    """`TernaryLinear` with the attributes of a BitLinear."""

    @property
    def W_ternary(self) -> torch.Tensor:
        """Trits [out, in] in {-1, 0, 1}, unpacked at each access."""
        return _numbers(self).codes.to(self.weight_dtype)

    @property
    def gamma(self) -> torch.Tensor:
        """Scale of every row [out]."""
        return self.scale.detach().expand(self.out_features).to(self.weight_dtype)


class MultiTernaryLinear(nn.Linear):
    """y = sum_j (x W_ternary[j]^T) gammas[j] + b, k planes fitted to the trainable `weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int = 3,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if k < 1:
            raise ConfigError(f"k={k} planes; 1 or more are wanted")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        ops.register()
        self.k = k

    @classmethod
    def from_linear(cls, linear: nn.Linear, k: int = 3) -> MultiTernaryLinear:
        """The layer that starts from the weights of `linear`, copied."""
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, k, linear.bias is not None, weight.device,
            weight.dtype,
        )  # fmt: skip
        layer.load_state_dict(linear.state_dict())
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]; the gradient of the planes goes to `weight`."""
        detached = self.weight.detach()
        left, values = detached.float(), torch.zeros_like(detached, dtype=torch.float32)
        for planes in _plane_counts(self.k):
            part = torch.ops.ternc.fake_quantize(left, planes, 0)
            left, values = left - part, values + part
        weight = values.to(detached.dtype) + (self.weight - detached)
        return F.linear(x, weight, self.bias)

    @property
    def W_ternary(self) -> torch.Tensor:
        """Trits [k, out, in] in {-1, 0, 1}, most significant plane first."""
        planes = [trit_planes(part.codes, part.planes) for part in self._parts()]
        return torch.cat(planes).to(self.weight.dtype)

    @property
    def gammas(self) -> torch.Tensor:
        """Scale of every row of every plane [k, out]."""
        scales = [
            part.scale * 3.0**p for part in self._parts() for p in reversed(range(part.planes))
        ]
        return torch.stack(scales).to(self.weight.dtype)

    def pack(self) -> PackedMultiTernaryLinear:
        """The same layer with packed bytes in the place of the master weight."""
        return PackedMultiTernaryLinear(self._parts(), self.bias, self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"

    def _parts(self) -> list[Quantized]:
        return balanced_parts(self.weight.detach().float(), self.k)


class PackedMultiTernaryLinear(nn.Module):
    """The sum of packed layers of up to three planes each; one layer for k <= 3."""

    def __init__(
        self, parts: list[Quantized], bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            TernaryLinear.from_quantized(
                part,
                bias if index == 0 else None,
                config=Config(planes=part.planes, group_size=None, activation_bits=None),
                weight_dtype=dtype,
            )
            for index, part in enumerate(parts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self.parts
        y = first(x)
        for part in rest:
            y = y + part(x)
        return y


def convert_linear_to_bitlinear(
    model: nn.Module, inplace: bool = False, config: Config | None = None
) -> nn.Module:
    """`model` with its linears, those of attention included, as packed one-plane layers.

    `ternc.report` of the result says what was converted, with the error of every layer, and what
    was skipped and why. Calling it again changes nothing.

    Args:
        config: default: one scale a row, activations in floating point; heads, embeddings and
            routers are left out.
    """
    model = ternc.quantize(model, config or CONFIG, inplace=inplace)
    made: dict[TernaryLinear, PackedBitLinear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is TernaryLinear and module.planes == 1:
            if module not in made:
                made[module] = _with_attributes(module)
            model = _put(model, path, made[module])
    return model


def _with_attributes(layer: TernaryLinear) -> PackedBitLinear:
    new = PackedBitLinear(
        layer.packed,
        layer.bias,
        config=layer.config,
        weight_dtype=layer.weight_dtype,
        transposed=layer.transposed,
        rotation=layer.rotation,
    )
    carry_over(layer, new)
    return new


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Sets the module at `path`; returns the root."""
    if not path:
        for name in ("_ternc_rows", "_ternc_config"):
            setattr(module, name, getattr(model, name))
        return module
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
    return model


def _numbers(layer: TernaryLinear) -> Quantized:
    packed = to_layout(layer.packed, layouts.at_rest_layout(layer.planes))
    state = at_rest.to_state(packed)
    return at_rest.from_state(
        state, "", (layer.out_features, layer.in_features), (layer.group_size,)
    )


def _plane_counts(k: int) -> list[int]:
    """Planes of every part: threes, then the rest."""
    return [3] * (k // 3) + ([k % 3] if k % 3 else [])
