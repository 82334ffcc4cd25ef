"""`TernaryLinear`: y = ternc::linear(x, packed W, b), in the place of a Linear.

Also what `TernaryEmbedding` holds its weight by.

The resident buffers are the weight: one copy, in the byte order that the device's kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ternc.config import INT8, Config
from ternc.decision import decide, decide_int8
from ternc.errors import CheckpointError, NotTernaryError
from ternc.formats import Refusal, detect_ternary, layouts
from ternc.formats.packed import Packed, pack
from ternc.formats.planewise import folded
from ternc.formats.quantized import Quantized, kind
from ternc.formats.rotation import Rotation
from ternc.modules import at_rest
from ternc.modules.product import product
from ternc.modules.relocation import moved, to_device, uncast
from ternc.policy import refine_rounds
from ternc.runtime import ops


class TernaryLinear(nn.Module):
    """Linear layer whose weight [out_features, in_features] is one to three trit planes, or int8.

    Input [..., in_features] in fp32, bf16 or fp16, output [..., out_features] in the same dtype
    (or autocast's). It differentiates with respect to input, bias and, on request, scales.

    Attributes:
        packed_weight: uint8 bytes in the order of `layout` (docs/architecture.md).
        scale: fp32 [N], [1], [N, G] or [N, G P]; a Parameter after `scale_requires_grad_()`.
        multiplier: uint8 in the order of `layout`, or None.
        bias: Parameter [N] or None.
        exact: the float weight already held these values.
        transposed: the layer that it replaced held its weight as [in_features, out_features].
        rotation: the packed weight is W R, and inputs are rotated before they are quantised.
        signs: int8 [in_features] of the rotation, one tensor for all layers rotated alike; or None.
        config: how a float weight is quantised when one is loaded into this layer.
    """

    multiplies = True
    """Activations meet the weight in a product, and are quantised for it."""

    packed_weight: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None
    signs: torch.Tensor | None
    rotation: Rotation | None
    bias: nn.Parameter | None
    group_size: int
    layout: int
    exact: bool
    free_planes: int

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None = None,
        *,
        config: Config,
        weight_dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        ops.register()
        self.out_features, self.in_features = packed.shape
        self.config = config
        self.activation_bits = config.activation_bits
        self.weight_dtype = weight_dtype
        self.transposed = transposed
        # Not persistent: `_save_to_state_dict` writes the form at rest instead.
        for name in ("packed_weight", "scale", "multiplier", "signs"):
            self.register_buffer(name, None, persistent=False)
        self._hold(packed)
        self._rotate_inputs(rotation)
        self.register_parameter("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        quantized: Quantized,
        bias: nn.Parameter | None = None,
        *,
        config: Config | None = None,
        weight_dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        rotation: Rotation | None = None,
    ) -> TernaryLinear:
        """Packs `quantized`, of the rotated weight if there is a `rotation`, for its device.

        Raises:
            WeightShapeError: no layout of that device holds its group size.
        """
        packed = pack(quantized, quantized.codes.device.type)
        return cls(
            packed,
            bias,
            config=config or Config(),
            weight_dtype=weight_dtype,
            transposed=transposed,
            rotation=rotation,
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: Config | None = None, name: str = ""
    ) -> TernaryLinear:
        """The layer that computes what `linear` does, its weight quantised by `config`.

        Raises:
            NotTernaryError: the weight cannot be held within the error budget, or not at all.
        """
        ops.register()
        config = config or Config()
        decision = decide(linear.weight.detach(), None, config, refine_rounds(config))
        if decision.quantized is None:
            raise NotTernaryError(f"{name or 'linear'}: {decision.reason}")
        return cls.from_quantized(
            decision.quantized, linear.bias, config=config, weight_dtype=linear.weight.dtype
        )

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        *,
        config: Config,
        group_size: int,
        planes: int,
        weight_dtype: torch.dtype,
        transposed: bool,
        device: torch.device,
    ) -> TernaryLinear:
        """A layer without a weight yet, on `device`: `load_state_dict` brings it."""
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        layout = layouts.at_rest_layout(planes)
        packed = Packed(nothing, nothing.float(), None, shape, group_size, layout)
        return cls(packed, bias, config=config, weight_dtype=weight_dtype, transposed=transposed)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(self, input)

    @property
    def weight(self) -> torch.Tensor:
        """The float weight, computed anew at each access: for code that looks, not for products.

        [out_features, in_features] ([in_features, out_features] where `transposed`) in the dtype of
        the weight that was replaced. Writing to it changes nothing.
        """
        apart = self.free_planes > 1
        keep = self.weight_dtype != torch.float64 and self.rotation is None and not apart
        weight = torch.ops.ternc.dequantize(
            self.packed_weight,
            self.scale.detach(),
            self.multiplier,
            self.out_features,
            self.packed.columns,
            self.group_size,
            self.layout,
            self.weight_dtype if keep else torch.float32,
        )
        if apart:
            weight = folded(weight, self.free_planes, self.group_size, self.in_features)
        if self.rotation is not None:
            weight = self.rotation.restore(weight)
        weight = weight.to(self.weight_dtype)
        return weight.t() if self.transposed else weight

    @property
    def planes(self) -> int:
        """Trit planes: 1, 2 or 3; or INT8."""
        return layouts.get(self.layout).planes * self.free_planes

    @property
    def packed(self) -> Packed:
        """The resident buffers, as they are, with their meaning."""
        return Packed(
            weight=self.packed_weight,
            scale=self.scale.detach() if self.scale.requires_grad else self.scale,
            multiplier=self.multiplier,
            shape=(self.out_features, self.in_features),
            group_size=self.group_size,
            layout=self.layout,
            exact=self.exact,
            free_planes=self.free_planes,
        )

    def packed_tensors(self) -> Iterator[torch.Tensor]:
        """The buffers that hold the weight."""
        tensors = (self.packed_weight, self.scale, self.multiplier)
        return (tensor for tensor in tensors if tensor is not None)

    def share_packed(self, other: TernaryLinear) -> None:
        """Uses the buffers of `other` from now on: a tied weight, held once."""
        for name in ("packed_weight", "scale", "multiplier"):
            self._place(name, getattr(other, name))
        self._describe(other.packed)
        self._rotate_inputs(other.rotation)

    def scale_requires_grad_(self, requires_grad: bool = True) -> TernaryLinear:
        """Makes `scale` a Parameter, so that it can be trained, or a buffer again."""
        scale = self.scale.detach()
        del self.scale
        if requires_grad:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale, persistent=False)
        return self

    def extra_repr(self) -> str:
        bits = 8 * self.packed.nbytes / max(self.out_features * self.in_features, 1)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"format='{describe(self)}', bits={bits:.2f}"
        )

    def _hold(self, packed: Packed) -> None:
        """Takes a weight over: in place where shapes agree, so that addresses stay."""
        new = {
            "packed_weight": packed.weight,
            "scale": packed.scale,
            "multiplier": packed.multiplier,
        }
        for name, tensor in new.items():
            old = getattr(self, name)
            if tensor is not None and _same_place(old, tensor):
                with torch.no_grad():
                    old.copy_(tensor)
            else:
                self._place(name, tensor)
        self._describe(packed)

    def _describe(self, packed: Packed) -> None:
        self.group_size, self.layout, self.exact = packed.group_size, packed.layout, packed.exact
        self.free_planes = packed.free_planes

    def _rotate_inputs(self, rotation: Rotation | None) -> None:
        self.rotation, self.signs = rotation, None
        if rotation is not None:
            self.signs = rotation.shared_signs(self.in_features, self.packed_weight.device)

    def _place(self, name: str, tensor: torch.Tensor | None) -> None:
        if name in self._parameters and tensor is not None:
            tensor = nn.Parameter(tensor.detach(), self.scale.requires_grad)
        setattr(self, name, tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Only the bias is cast: bytes and scales are moved, into the layout of the new device.
        before, scale = self.packed, self._parameters.get("scale")
        buffers, parameters = self._buffers, self._parameters
        self._buffers, self._parameters = {}, {"bias": self.bias}
        try:
            super()._apply(fn, recurse)
        finally:
            parameters.update(self._parameters)
            self._buffers, self._parameters = buffers, parameters
        after = moved(before, fn)
        if scale is None:
            self.scale = after.scale
        else:
            scale.data = after.scale
            if scale.grad is not None:
                scale.grad.data = uncast(scale.grad, fn)
        self.packed_weight, self.multiplier = after.weight, after.multiplier
        self.layout = after.layout
        self._rotate_inputs(self.rotation)
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=before.weight.device))
        self.weight_dtype = probe.dtype if probe.is_floating_point() else self.weight_dtype
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        ops.register()
        super().__setstate__(state)

    def _save_to_state_dict(
        self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in at_rest.to_state(self.packed, self.rotation).items():
            # A scale that is trained stays the fp32 Parameter that it is.
            if "scale" not in self._parameters or not name.startswith("scale"):
                destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the form at rest, or a float `weight`, which is quantised by `config`."""
        known = {prefix + name: name for name in (*at_rest.NAMES, "weight")}
        own = {known[key]: value for key, value in state_dict.items() if key in known}
        rest = {key: value for key, value in state_dict.items() if key not in known}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "scale" in missing_keys:  # a Parameter, which the base class looks for
            missing_keys.remove(prefix + "scale")
        if not own:
            if strict:
                missing_keys.append(prefix + ("codes" if self.planes == INT8 else "trits"))
            return
        try:
            packed, rotation = self._packed_from(own, prefix)
            self._hold(packed)
            self._rotate_inputs(rotation)
        except CheckpointError as error:
            error_msgs.append(str(error))

    def _packed_from(
        self, own: Mapping[str, torch.Tensor], prefix: str
    ) -> tuple[Packed, Rotation | None]:
        for name, tensor in own.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{prefix}{name} is a {type(tensor).__name__}, not a tensor")
        device = self.packed_weight.device
        shape = (self.out_features, self.in_features)
        if "weight" not in own:
            sizes = (self.group_size, self.config.fit_group)
            quantized = at_rest.from_state(own, prefix, shape, sizes)
            rotation = at_rest.rotation_from_state(own, prefix, self.in_features)
            return to_device(pack(quantized, device.type), device), rotation
        if len(own) > 1:
            raise CheckpointError(f"{prefix}weight stands beside {sorted(set(own) - {'weight'})}")
        weight = own["weight"].t() if self.transposed else own["weight"]
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            raise CheckpointError(
                f"{prefix}weight is {own['weight'].dtype} {list(own['weight'].shape)}; this layer "
                f"holds a float weight of {shape[0]} outputs and {shape[1]} inputs"
            )
        weight, rotation = weight.detach().to(device), self.rotation
        if rotation is not None:
            # What is ternary by value is held exactly, which a rotated weight never is.
            exact = not isinstance(detect_ternary(weight), Refusal)
            weight, rotation = (weight, None) if exact else (rotation.rotate(weight), rotation)
        if self.planes == INT8:
            decision = decide_int8(weight)
        else:
            decision = decide(weight, None, self.config, refine_rounds(self.config))
        if decision.quantized is None:
            raise CheckpointError(
                f"{prefix}weight cannot be held in this packed layer: {decision.reason}; "
                "quantise the float model again instead"
            )
        return pack(decision.quantized, device.type), rotation


def describe(layer: TernaryLinear) -> str:
    """Format for reports: `ternary x3 g128 a8`, `ternary x1 g128 a8 rotated`, `int8 row a8`."""
    if layer.group_size:
        unit = f"g{layer.group_size}"
    else:
        unit = "row" if layer.scale.shape[0] == layer.out_features else "tensor"
    bits = layer.activation_bits
    unit += " free" if layer.free_planes > 1 else ""
    rotated = " rotated" if layer.rotation is not None else ""
    activations = f" a{bits}" if bits else " float activations"
    return f"{kind(layer.planes)} {unit}{activations if layer.multiplies else ''}{rotated}"


def _same_place(old: torch.Tensor | None, new: torch.Tensor) -> bool:
    return old is not None and (old.shape, old.dtype, old.device) == (
        new.shape,
        new.dtype,
        new.device,
    )
