"""A frozen dataclass of settings -> options of a command line, and back.

Every field is one option of its name: its type hint says what is parsed, the string below the field
is the help, the default is the dataclass's. A setting that is added there is an option at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

NONE = "none"
"""How None is written."""

Settings = TypeVar("Settings")


def add_options(
    parser: argparse.ArgumentParser, cls: type, prefix: str = "", without: Sequence[str] = ()
) -> None:
    """One option a field of `cls`.

    Args:
        prefix: of the options' names, as "tuning" for --tuning-epochs.
        without: fields that the command could not obey.
    """
    hints, helps = typing.get_type_hints(cls), _help_of(cls)
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    group = parser.add_argument_group(f"{cls.__name__} ({summary})")
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        flag = "--" + f"{prefix} {field.name}".strip().replace("_", "-").replace(" ", "-")
        known: dict[str, Any] = {
            "dest": _place(cls, field.name),
            "default": argparse.SUPPRESS,  # what is not given is the dataclass's to choose
            "help": _described(helps[field.name], field.default),
        }
        kinds = _kinds(hints[field.name])
        if kinds == [bool]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **known)
        elif any(typing.get_origin(kind) is tuple for kind in kinds):
            group.add_argument(flag, action="append", metavar="GLOB", **known)
        else:
            group.add_argument(flag, type=_parser(kinds), metavar=_metavar(kinds), **known)


def given(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that the command line sets."""
    names = [field.name for field in dataclasses.fields(cls)]
    values = vars(namespace)
    return {name: values[_place(cls, name)] for name in names if _place(cls, name) in values}


def settings_of(namespace: argparse.Namespace, cls: type[Settings]) -> Settings:
    """What the options ask for. Raises what the dataclass does for a bad value."""
    return cls(**given(namespace, cls))


def _place(cls: type, name: str) -> str:
    return f"{cls.__name__}.{name}"


@functools.cache
def _help_of(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found, name = {}, ""
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name:
            found[name] = " ".join(str(statement.value.value).replace("`", "").split())
    return found


def _described(text: str, default: Any) -> str:
    said = " ".join(default) if isinstance(default, tuple) else _written(default)
    if isinstance(default, tuple):
        text += " May be repeated; replaces the default."
    return f"{text} (default: {said or NONE})".replace("%", "%%")


def _written(value: Any) -> str:
    return NONE if value is None else str(value)


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type hint."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [hint]


def _words(kinds: list[Any]) -> dict[str, Any]:
    """The values that are written as words."""
    words = {w: w for k in kinds if typing.get_origin(k) is Literal for w in typing.get_args(k)}
    return words | ({NONE: None} if type(None) in kinds else {})


def _numbers(kinds: list[Any]) -> list[Callable[[str], Any]]:
    return [kind for kind in (int, float, str) if kind in kinds]


def _metavar(kinds: list[Any]) -> str:
    names: dict[Callable[[str], Any], str] = {int: "N", float: "X", str: "NAME"}
    return "|".join([*_words(kinds), *(names[kind] for kind in _numbers(kinds))])


def _parser(kinds: list[Any]) -> Callable[[str], Any]:
    """Text -> value; a number of the right kind is left to the dataclass to judge."""
    words, numbers = _words(kinds), _numbers(kinds)

    def parse(text: str) -> Any:
        if text in words:
            return words[text]
        for number in numbers:
            try:
                return number(text)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {_metavar(kinds)}")

    return parse
