"""A function -> a text that another process gives for the same function, and only for that."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

from torch import nn


def identity(function: Any) -> str:
    """Name of a function, its plain arguments and cells, and a digest of its code.

    What it looks up elsewhere (globals, attributes of an object) is not seen.
    """
    if isinstance(function, functools.partial):
        given = (*function.args, *sorted(function.keywords.items()))
        return f"{identity(function.func)} {_plain(given)}"
    if isinstance(function, nn.Module):
        function = function.forward
    return f"{_named(function)} {_plain(list(_cells(function)))}"


def _named(function: Any) -> str:
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    owner = function if hasattr(function, "__qualname__") else type(function)
    digest = hashlib.sha256(repr(_code(code)).encode()).hexdigest()
    return f"{owner.__module__}.{owner.__qualname__} {digest[:16]}"


def _cells(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing in it yet
            yield None


def _code(value: Any) -> Any:
    """What code does, without where it stands."""
    if isinstance(value, types.CodeType):
        return (value.co_code, value.co_names, [_code(constant) for constant in value.co_consts])
    return _plain(value)


def _plain(value: Any) -> str:
    """The same text for the same value in every process."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, frozenset):
        return f"{sorted(map(_plain, value))}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    return _named(value) if callable(value) else type(value).__qualname__
