"""Stacks of matrices in one parameter, as experts hold them -> rows that say why they were left.

`quantize` replaces modules, and a stack has none: the product that reads it is found in the graph,
by the backend.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ternc.config import Config
from ternc.passes.context import skipped_row
from ternc.policy import excluded
from ternc.reporting import Row

PATTERN = "stacked weights"
_REASON = (
    "a stack of {count} matrices in one parameter: quantize replaces modules; "
    'torch.compile(model, backend="ternc") packs stacks that a grouped or batched product reads'
)
_KERNELS = (nn.modules.conv._ConvNd, nn.Bilinear)
"""Modules whose three-dimensional weight is one operator, not a stack of matrices."""


def stacked_rows(model: nn.Module, config: Config) -> Iterator[Row]:
    """A row of each floating-point parameter [E, N, K], E > 1, under the parameter's own path."""
    for path, module in model.named_modules():
        if isinstance(module, _KERNELS):
            continue
        for leaf, weight in module._parameters.items():
            if weight is None or nn.parameter.is_lazy(weight) or not weight.is_floating_point():
                continue
            if weight.dim() == 3 and weight.shape[0] > 1:
                name = f"{path}.{leaf}" if path else leaf
                reason = excluded(name, config) or _REASON.format(count=weight.shape[0])
                yield skipped_row(name, PATTERN, reason, weight)
