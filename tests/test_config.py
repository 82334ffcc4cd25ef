"""Config: every bad value is a ConfigError that names the field, and JSON round trips."""

from __future__ import annotations

import itertools
import json

import pytest

from ternc.config import Config, field_names
from ternc.errors import ConfigError, TerncError, UnknownOptionError

BAD = [
    ("planes", 0),
    ("planes", 4),
    ("planes", 2.0),
    ("planes", True),
    ("planes", "2"),
    ("error_budget", 0),
    ("error_budget", 1.0),
    ("error_budget", "x"),
    ("error_budget", None),
    ("bits_budget", 0.5),
    ("bits_budget", "a"),
    ("group_size", 0),
    ("group_size", 6),
    ("group_size", -4),
    ("group_size", 128.0),
    ("group_size", "row"),
    ("activation_bits", 16),
    ("activation_bits", 8.0),
    ("rotation", "random"),
    ("method", "awq"),
    ("exclude", "lm_head"),
    ("exclude", None),
    ("include", [1]),
    ("seed", "0"),
    ("seed", True),
    ("tie_scales", "yes"),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=str)
def test_bad_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        Config(**{field: value})
    assert isinstance(caught.value, TerncError) and isinstance(caught.value, ValueError)
    assert repr(value) in str(caught.value)


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(UnknownOptionError, match="error_budget"):
        Config.from_dict({"plane": 1})


@pytest.mark.parametrize(
    "config",
    [Config(), Config(planes=2, group_size="tensor", exclude=["a*"], activation_bits=None)],
    ids=["default", "changed"],
)
def test_json_round_trip(config):
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == set(field_names())


def test_every_field_has_its_own_documentation():
    import ast
    import inspect

    import ternc.config

    tree = ast.parse(inspect.getsource(ternc.config))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    documented = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert documented == set(field_names())
