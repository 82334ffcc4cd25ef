"""The state of the schedule of every weight that compiled graphs train: fp32 [3] in host memory,
source bits, target bits, blend. Graphs are handed the tensors at every call.

States belong to the Parameter, not to a graph: prompts of other lengths, and graphs compiled anew,
go on with the state that the schedule has reached.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.formats.blend import FLOAT, TERNARY
from ternc.runtime.identity import at_death, token_of


@dataclasses.dataclass(frozen=True)
class ScheduleState:
    """Written in place by schedules; at first the final quantisers."""

    weight: torch.Tensor
    activation: torch.Tensor


_STATES: dict[int, dict[str, ScheduleState]] = {}
"""By the identity of the Parameter's token."""


def state_of(parameter: torch.Tensor, key: str, activation_bits: int) -> ScheduleState:
    """The state of one weight computed from `parameter`; `key` tells its parts apart."""
    identity = id(token_of(parameter))
    if identity not in _STATES:
        _STATES[identity] = {}
        at_death(parameter, _STATES.pop, identity, None)
    states = _STATES[identity]
    if key not in states:
        bits = float(activation_bits or FLOAT)
        with torch.inference_mode(False):
            states[key] = ScheduleState(
                torch.tensor([TERNARY, TERNARY, 1.0], device="cpu"),
                torch.tensor([bits, bits, 1.0], device="cpu"),
            )
    return states[key]
