"""`Report`: what was done to every layer, and why. Data first; table, JSON and graph are views of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass
class Row:
    """One weight found (each Linear under its own module path) or one attention region."""

    name: str
    """Module path, `layers.3.mlp.up`."""
    pattern: str
    """What was found, with fused partners: `linear`, `multihead_attention.in_proj`, ..."""
    action: Literal["rewritten", "skipped"]
    reason: str
    """Why, in words a user understands; never empty."""
    format: str = "float"
    """`ternary x3 g128 a8`, `float`, ..."""
    shape: tuple[int, ...] = ()
    """Shape of the float weight, (N, K)."""
    bytes_before: int = 0
    bytes_after: int = 0
    """Bytes of the resident buffers that replace the weight (equal to bytes_before when skipped)."""
    bytes_at_rest: int = 0
    """Bytes of the same weight in a state_dict or file."""
    bits_per_weight: float = 0.0
    """8 * bytes_after / number of weights."""
    weight_error: float | None = None
    """||W - Q|| / ||W||, Frobenius."""
    output_error: float | None = None
    """Relative error of the layer's output on calibration data."""
    kernel: str | None = None
    """Kernel that the last call really ran; None before the first call."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
