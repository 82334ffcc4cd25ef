"""x -> x.to(dtype) before a product that autocast runs in another dtype: one cast for all readers."""

from __future__ import annotations

import torch
from torch import fx

from ternc.passes.graph import mode_switches
from ternc.passes.inline import inline
from ternc.passes.region import written_outside


def cast_before(at: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """x in `dtype`, computed before `at`: by the cast of an earlier product where it holds here."""
    for user in x.users:
        if user.meta.get("ternc_cast") == dtype and user < at and not written_outside({x}):
            if not any(user < switch < at for switch in mode_switches(at.graph)):
                return user
    cast = inline(at, lambda value: value.to(dtype), x)
    cast.meta["ternc_cast"] = dtype
    return cast
