"""Tensors, known again without being kept alive and without weak references to themselves, which
torch.utils.swap_tensors (`to` and `load_state_dict` under torch.__future__) refuses.

A tensor's attributes hold a token that nothing else does: it dies with the tensor, and leaves it
when the tensor's content is swapped for another's.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch

_ATTRIBUTE = "_ternc_token"

Token = OrderedDict[str, None]
"""Always empty. A class that takes weak references and that every loader of pickles knows."""


def token_of(tensor: torch.Tensor) -> Token:
    """The token of a tensor, which gets one at the first call."""
    return tensor.__dict__.setdefault(_ATTRIBUTE, OrderedDict())


def at_death(tensor: torch.Tensor, act: Callable[..., object], *args: object) -> None:
    """Calls `act(*args)` when the tensor dies or its content is swapped; not when Python ends."""
    weakref.finalize(token_of(tensor), act, *args).atexit = False


class Known:
    """One tensor."""

    __slots__ = ("_token", "identity")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.identity = id(tensor)
        self._token = weakref.ref(token_of(tensor))

    @property
    def alive(self) -> bool:
        """False once the tensor has died, or its content was swapped and the former one died."""
        return self._token() is not None

    def __call__(self, tensor: object) -> bool:
        """Whether `tensor` is this one, its content not swapped since."""
        if id(tensor) != self.identity or not isinstance(tensor, torch.Tensor):
            return False
        token = tensor.__dict__.get(_ATTRIBUTE)
        return token is not None and token is self._token()
