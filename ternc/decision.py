"""What one float weight becomes: exactly ternary, ternary within the error budget, or what it
was.
"""

from __future__ import annotations

import dataclasses

import torch

from ternc.config import Config
from ternc.formats import layouts
from ternc.formats.detect import detect_ternary
from ternc.formats.fit import choose, refuse
from ternc.formats.int8 import fit_int8
from ternc.formats.quantized import Quantized, Refusal
from ternc.formats.rotation import Rotation
from ternc.site import Decision


def decide(weight: torch.Tensor, planes: int | None, config: Config, refine: int = 0) -> Decision:
    """Decision for a weight [N, K].

    Args:
        planes: plane count of a graph that is compiled already; a weight that needs fewer is
        fitted with these.
        refine: rounds of alternating least squares after the closed form.
    """
    found = detect_ternary(
        weight, config.group_size if isinstance(config.group_size, int) else None
    )
    if not isinstance(found, Refusal):
        return Decision(found, "ternary by value: lowered exactly", 0.0)
    near = f"; {found.reason}" if found.near_ternary else ""
    chosen = choose(weight, config, refine=refine)
    if isinstance(chosen, Refusal):
        return Decision(None, chosen.reason + near)
    if planes is not None and chosen.planes < planes:
        fixed = choose(weight, dataclasses.replace(config, planes=planes), refine=refine)
        if not isinstance(fixed, Refusal):
            chosen = fixed
    if config.planes == "auto" and (grown := _grown(chosen, weight)):
        return Decision(None, grown)
    return Decision(chosen, _rule(config, chosen.planes) + near, chosen.relative_error(weight))


def decide_int8(weight: torch.Tensor, planes: int | None = None) -> Decision:
    """Decision for a weight [N, K] that is asked for as int8 codes with one scale a row.

    `planes` is INT8 or None: the argument that `decide` has.
    """
    if refusal := refuse(weight):
        return Decision(None, refusal.reason)
    quantized = fit_int8(weight)
    return Decision(
        quantized, "int8 with a scale a row, as configured", quantized.relative_error(weight)
    )


def decide_rotated(
    weight: torch.Tensor,
    planes: int | None,
    config: Config,
    rotation: Rotation | None,
    refine: int = 0,
) -> Decision:
    """`decide` for W R where there is a rotation; a weight that is ternary by value stays as it is.

    Args: as for `decide`.
    """
    group = config.group_size if isinstance(config.group_size, int) else None
    if rotation is None or not isinstance(found := detect_ternary(weight, group), Refusal):
        return decide(weight, planes, config, refine)
    decision = decide(rotation.rotate(weight), planes, config, refine)
    near = f"; {found.reason}" if found.near_ternary else ""
    return dataclasses.replace(decision, rotation=rotation, reason=decision.reason + near)


def rotation_asked(config: Config, columns: int) -> Rotation | None:
    """The rotation of the inputs of a weight of `columns`, where no calibration data choose it."""
    rotation = Rotation.of(columns, config.seed)
    return rotation if config.rotation == "hadamard" and rotation.block > 1 else None


def _grown(quantized: Quantized, weight: torch.Tensor) -> str | None:
    """Why a small weight is better left alone: layouts pad rows to whole blocks."""
    layout = layouts.get(layouts.resident_layout(quantized.planes, weight.device.type))
    packed = layout.nbytes(*quantized.shape)
    if packed < weight.nbytes:
        return None
    return f"packed in {packed:,} bytes it would not be smaller than its {weight.nbytes:,}"


def fewest(planes: int, budget: float) -> str:
    """The reason of a plane count that "auto" chose."""
    if planes == 1:
        return f"one plane is within error_budget {budget:g}"
    return f"{planes} planes are the fewest within error_budget {budget:g}"


def _rule(config: Config, planes: int) -> str:
    if config.planes == "auto":
        return fewest(planes, config.error_budget)
    return f"planes={planes} as configured"
