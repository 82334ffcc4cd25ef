"""`GraphLayer`: a weight that a compiled graph trains, with the interface of a `QATLinear`.

`torch.compile(model, backend="ternc")` of a float model with gradients fake-quantises its weights
without any module of ours; their schedules move through these.
"""

from __future__ import annotations

import torch
from torch import nn

from ternc.formats.blend import WEIGHT_BITS
from ternc.runtime.states import ScheduleState, state_of
from ternc.site import TrainedWeight
from ternc.train.schedule import BlendState, describe_state, write_state


class GraphLayer:
    """The state and the values of one weight of compiled graphs.

    Attributes:
        transposed: never: values have the layout [out_features, in_features] of the product.
    """

    transposed = False

    def __init__(self, parameter: nn.Parameter, trained: TrainedWeight) -> None:
        self.parameter, self.trained = parameter, trained

    @property
    def state(self) -> ScheduleState:
        """The tensors that graphs read, fp32 [3] in host memory."""
        return state_of(self.parameter, self.trained.key, self.trained.activation_bits)

    @property
    def quantizer(self) -> str:
        """The current quantiser in words, `1.58` or `8 -> 4 (0.31)`."""
        return describe_state(self.state.weight)

    def set_schedule(self, weights: BlendState, activations: BlendState | None = None) -> None:
        """Writes the state of the schedule, in place."""
        write_state(self.state.weight, weights)
        if activations is not None and self.trained.activation_bits:
            write_state(self.state.activation, activations)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Values [out_features, in_features] of the current quantiser."""
        weight = self.trained.evaluate([self.parameter])
        numbers = (self.trained.planes, self.trained.group_size)
        return torch.ops.ternc.blend_quantize(weight, self.state.weight, WEIGHT_BITS, *numbers)
