"""`QATLinear`: y = Q_a(H x) Q(W diag(scale))^T + b, a Linear that trains the weight it will ship.

    weight --scale--> quantisers of the schedule --blend--> values, gradient straight through
    x --Hadamard--> activation quantiser --> product --> bias + shift + dead zone

The quantisers are ternc::fake_quantize (or mean magnitudes) and ternc::fake_quantize_act: what
`ternc.quantize` packs is what was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ternc.config import Config
from ternc.errors import BlendedWeightError, DifferentiationError
from ternc.formats.blend import FLOAT, TERNARY, blended, values_by_bits
from ternc.formats.quantized import Quantized
from ternc.formats.rotation import Rotation
from ternc.modules.product import is_transformed
from ternc.runtime import ops
from ternc.runtime.ops.linear import integer_linear
from ternc.site import Decision
from ternc.train.quantizers import ternary
from ternc.train.scale import LearntScale
from ternc.train.schedule import BlendState, describe_state, write_state
from ternc.train.sharding import full

SMALLEST_SCALE = 1e-3
"""Learnt scales of the transform are kept at or above this."""


@dataclasses.dataclass(frozen=True)
class SiteSettings:
    """What one layer becomes and how it gets there; fixed while it trains."""

    planes: int
    group_size: int
    """Columns, 0 = row, -1 = tensor."""
    scale: str = "fit"
    activation_bits: int = 8
    """8, 4, or 0 for floating point."""
    formats: tuple[float, ...] = (TERNARY,)
    """Bit-widths that the schedule of the weights meets."""
    activation_formats: tuple[float, ...] = ()
    """Bit-widths that the schedule of the activations meets; empty = no schedule."""
    rotation: Rotation | None = None
    learn_scale: bool = False
    learn_shift: bool = False
    dead_zone: float = 0.0


class QATLinear(nn.Linear):
    """Linear layer whose weight and input are quantised in the forward pass.

    It holds the very Parameters of the Linear that it replaces, under the same names. The state of
    the schedule is in buffers: setting it compiles nothing anew, and `state_dict` has it.

    Attributes:
        weight_state: fp32 [3]: bits the blend comes from, bits it goes to, blend in [0, 1].
        activation_state: fp32 [3], the same for the input; None without a schedule.
        learnt_scale: `LearntScale` or None.
        hadamard_scale: Parameter [in_features] or None.
        hadamard_shift: Parameter [in_features] or None.
        offset: added to the quantised weight, [out_features, in_features] or None.
        transposed: the weight is held as [in_features, out_features].
        config: of the packed layer.
    """

    weight: nn.Parameter
    hadamard_scale: nn.Parameter | None
    hadamard_shift: nn.Parameter | None
    signs: torch.Tensor | None
    weight_state: torch.Tensor
    activation_state: torch.Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        settings: SiteSettings,
        *,
        config: Config | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        ops.register()
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        self.in_features, self.out_features = int(columns), int(rows)
        self.settings, self.config, self.transposed = settings, config or Config(), transposed
        self.offset: torch.Tensor | None = None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        device = weight.device
        for name, wanted, value in (
            ("hadamard_scale", settings.learn_scale, 1.0),
            ("hadamard_shift", settings.learn_shift, 0.0),
        ):
            made = torch.full((self.in_features,), value, dtype=weight.dtype, device=device)
            self.register_parameter(name, nn.Parameter(made) if wanted else None)
        signs = None
        if settings.rotation is not None:
            signs = settings.rotation.shared_signs(self.in_features, device)
        self.register_buffer("signs", signs, persistent=False)
        start = torch.tensor([TERNARY, TERNARY, 1.0], device=device)
        self.register_buffer("weight_state", start)
        bits = float(settings.activation_bits or FLOAT)
        acts = torch.tensor([bits, bits, 1.0], device=device)
        self.register_buffer("activation_state", acts if settings.activation_formats else None)
        self.learnt_scale: LearntScale | None = None
        self.fit_scale()

    def fit_scale(self) -> None:
        """Starts learnt scales at those of least squares; nothing where scales are not learnt."""
        if self.settings.scale == "learnt":
            self.learnt_scale = LearntScale(self._fitted("fit"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] -> [..., out_features].

        Without gradients, and with the final quantisers, the sums are the integer sums of
        ternc::linear: bit for bit what the packed layer gives. A compiled graph keeps the floating
        point product of the same values.

        Raises:
            DifferentiationError: inside torch.func or forward-mode differentiation.
        """
        if is_transformed():
            raise DifferentiationError(
                f"QATLinear({self.in_features}, {self.out_features}) is trained by backward(): "
                "torch.func and forward mode do not pass its quantisers; quantize the model first"
            )
        if self.settings.rotation is not None:
            input = torch.ops.ternc.hadamard(input, self.signs, self.settings.rotation.block)
        if self._gives_integers():
            return self._integer_product(input)
        weight = self.effective_weight()
        dead = weight.detach() == 0 if self.settings.dead_zone else None
        if self.offset is not None:
            weight = weight + self.offset
        return F.linear(self._quantized_input(input), weight, self._bias(weight, dead))

    def matrix(self) -> torch.Tensor:
        """The weight [out_features, in_features], learnt scales folded in, differentiable."""
        weight = full(self.weight)
        weight = weight.t() if self.transposed else weight
        if self.hadamard_scale is not None:
            weight = weight * full(self.hadamard_scale).clamp(min=SMALLEST_SCALE)
        return weight

    def effective_weight(self) -> torch.Tensor:
        """What the product uses now, [out_features, in_features]; its gradient is `matrix`'s."""
        weight, settings = self.matrix(), self.settings
        if self.learnt_scale is not None:
            return self.learnt_scale(weight)
        if settings.formats == (TERNARY,) and settings.scale == "fit":
            return torch.ops.ternc.fake_quantize(weight, settings.planes, settings.group_size)
        values = self.values(weight.detach())
        return values + (weight - weight.detach())

    @torch.no_grad()
    def values(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Values [out_features, in_features] of the current quantiser, without gradient."""
        settings = self.settings
        weight = self.matrix().detach() if weight is None else weight
        if settings.formats == (TERNARY,):
            return self._final(weight)
        if settings.scale == "fit" and self.learnt_scale is None:
            return torch.ops.ternc.blend_quantize(
                weight,
                self.weight_state,
                settings.formats,
                settings.planes,
                settings.group_size,
            )
        final = self._final(weight) if TERNARY in settings.formats else None
        return blended(values_by_bits(weight, settings.formats, final), self.weight_state)

    def quantized(self) -> Quantized:
        """Codes and scales of the final quantiser."""
        if self.learnt_scale is not None:
            return self.learnt_scale.quantized(self.matrix().detach())
        return self._fitted(self.settings.scale)

    def set_schedule(self, weights: BlendState, activations: BlendState | None = None) -> None:
        """Writes the state of the schedule into the buffers, in place."""
        write_state(self.weight_state, weights)
        if self.activation_state is not None and activations is not None:
            write_state(self.activation_state, activations)

    @property
    def quantizer(self) -> str:
        """The current quantiser in words, `1.58` or `8 -> 4 (0.31)`. Waits for the device."""
        return describe_state(self.weight_state)

    @property
    def is_final(self) -> bool:
        """Nothing is blended any more. Waits for the device where there is a schedule."""
        return all(_is_at(state, bits) for _, state, bits in self._states())

    def decision(self, name: str = "") -> Decision:
        """What packing makes of the weight.

        Raises:
            BlendedWeightError: the schedule has not reached its final quantiser.
        """
        for what, state, bits in self._states():
            if not _is_at(state, bits):
                raise BlendedWeightError(
                    f"{name or 'layer'}: the {what} is quantised as {describe_state(state)} bits, "
                    f"not yet as {bits:g}; train to the end of the schedule, or call "
                    "ternc.train.finish(model) to switch to the final quantiser now"
                )
        quantized = self.quantized()
        error = quantized.relative_error(self.matrix())
        return Decision(quantized, "as trained", error, rotation=self.settings.rotation)

    def packed_bias(self) -> nn.Parameter | None:
        """The bias with shift and dead zone folded in; the Parameter itself where there is none."""
        if self.hadamard_shift is None and not self.settings.dead_zone:
            return self.bias
        with torch.no_grad():
            weight = self.quantized().dequantize().to(self.weight.dtype)
            folded = self._bias(weight, weight == 0 if self.settings.dead_zone else None)
        assert folded is not None
        return nn.Parameter(folded.clone(), self.bias is None or self.bias.requires_grad)

    def extra_repr(self) -> str:
        settings = self.settings
        turned = f", rotation={settings.rotation.block}" if settings.rotation else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"planes={settings.planes}, group_size={settings.group_size}, "
            f"activation_bits={settings.activation_bits}{turned}"
        )

    def _fitted(self, scale: str) -> Quantized:
        group = 0 if self.settings.group_size >= self.in_features else self.settings.group_size
        return ternary(self.matrix().detach(), self.settings.planes, group, scale)

    def _states(self) -> Iterator[tuple[str, torch.Tensor, float]]:
        """What follows a schedule, its state, and the bits at the schedule's end."""
        if self.settings.formats != (TERNARY,):
            yield "weight", self.weight_state, TERNARY
        if self.activation_state is not None:
            yield "input", self.activation_state, float(self.settings.activation_bits or FLOAT)

    def _gives_integers(self) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.offset is not None:
            return False
        return bool(self.settings.activation_bits) and self.is_final

    def _integer_product(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            q, scale = torch.ops.ternc.quantize_act(x, self.settings.activation_bits)
            return integer_linear(q, scale, self.quantized(), self.packed_bias()).to(x.dtype)

    def _final(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 or the weight's dtype [N, K]: values of the final quantiser."""
        settings = self.settings
        if self.learnt_scale is not None:
            return self.learnt_scale.quantized(weight).dequantize().to(weight.dtype)
        if settings.scale == "fit":
            return torch.ops.ternc.fake_quantize(weight, settings.planes, settings.group_size)
        return ternary(weight, 1, settings.group_size, settings.scale).dequantize().to(weight.dtype)

    def _bias(self, weight: torch.Tensor, dead: torch.Tensor | None) -> torch.Tensor | None:
        """b + W shift + lambda sum of the master weights whose trit is 0 (`dead`, bool [N, K])."""
        bias: torch.Tensor | None = self.bias
        if self.hadamard_shift is not None:
            # A sum, not a product of matrices: the backend would take it for a linear of its own.
            shift = (weight * self.hadamard_shift).sum(1)
            bias = shift if bias is None else bias + shift
        if dead is not None:
            asleep = self.settings.dead_zone * (self.matrix() * dead).sum(1)
            bias = asleep if bias is None else bias + asleep
        return bias

    def _quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        if self.activation_state is None:
            bits = settings.activation_bits
            return torch.ops.ternc.fake_quantize_act(x, bits) if bits else x
        formats = settings.activation_formats
        return torch.ops.ternc.blend_quantize_act(x, self.activation_state, formats)


def _is_at(state: torch.Tensor, bits: float) -> bool:
    _, target, blend = state.tolist()
    return abs(target - bits) < 1e-3 and blend == 1.0
