"""The state of the schedule of every weight that compiled graphs train: fp32 [3] in host memory,
source bits, target bits, blend. Graphs are handed the tensors at every call.

States belong to the Parameter, not to a graph: prompts of other lengths, and graphs compiled anew,
go on with the state that the schedule has reached.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ternc.formats.blend import FLOAT, TERNARY


@dataclasses.dataclass(frozen=True)
class ScheduleState:
    """Written in place by schedules; at first the final quantisers."""

    weight: torch.Tensor
    activation: torch.Tensor


_STATES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def state_of(parameter: torch.Tensor, key: str, activation_bits: int) -> ScheduleState:
    """The state of one weight computed from `parameter`; `key` tells its parts apart."""
    states = _STATES.setdefault(parameter, {})
    if key not in states:
        bits = float(activation_bits or FLOAT)
        with torch.inference_mode(False):
            states[key] = ScheduleState(
                torch.tensor([TERNARY, TERNARY, 1.0], device="cpu"),
                torch.tensor([bits, bits, 1.0], device="cpu"),
            )
    return states[key]
