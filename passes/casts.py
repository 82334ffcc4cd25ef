"""x -> x.to(dtype) before products that autocast runs in another dtype: one cast for all."""

from __future__ import annotations

import torch
from torch import fx

from ternc.passes.graph import mode_switches
from ternc.passes.inline import inline
from ternc.passes.region import written_outside


def cast_before(at: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """x in `dtype`, computed before `at`: by the cast of an earlier product where it holds here."""
    switches = mode_switches(at.graph)
    for user in x.users:
        if user.meta.get("ternc_cast") != dtype or not user < at or written_outside({x}):
            continue
        if not any(user < switch < at for switch in switches):
            return user
    cast = inline(at, lambda value: value.to(dtype), x)
    cast.meta["ternc_cast"] = dtype
    return cast
