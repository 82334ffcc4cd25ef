"""Sites -> share of zero trits, and share of codes that changed since the last look."""

from __future__ import annotations

import torch

from ternc.train.site import Site


class TritMonitor:
    """Remembers the codes of every site between two looks (one byte a weight)."""

    def __init__(self) -> None:
        self._codes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def look(self, found: list[Site]) -> dict[str, float]:
        """`zero_fraction` of all codes now, `flip_rate` since the last look (0 the first time)."""
        zeros = flips = count = 0
        for site in found:
            codes = site.module.quantized().codes
            before = self._codes.get(site.name)
            zeros += int((codes == 0).sum())
            flips += 0 if before is None else int((codes != before).sum())
            count += codes.numel()
            self._codes[site.name] = codes
        share = max(count, 1)
        return {"zero_fraction": zeros / share, "flip_rate": flips / share}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The codes by site name."""
        return dict(self._codes)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._codes = {name: value.clone() for name, value in state.items()}
