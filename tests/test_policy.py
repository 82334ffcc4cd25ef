"""What the configuration says about a layer by name, and what this version refuses."""

import pytest

from ternc.config import DEFAULT_EXCLUDE, Config
from ternc.errors import ConfigError
from ternc.policy import excluded, marked_int8, refine_rounds, refuse_live, refuse_offline


@pytest.mark.parametrize(
    "name", ["lm_head", "model.lm_head", "model.embed_tokens", "layers.0.mlp.gate", "h.1.router.fc"]
)
def test_heads_embeddings_and_routers_stay(name):
    reason = excluded(name, Config())
    assert reason is not None and "excluded by name" in reason


def test_a_gate_is_a_router_where_it_has_fewer_outputs_than_inputs():
    for config in (Config(), Config(exclude=(*DEFAULT_EXCLUDE, "down"))):
        assert excluded("mlp.gate", config, (8, 64)) == "excluded by name ('*.gate')"
        assert excluded("mlp.gate", config, (256, 64)) is None
        assert excluded("gate", config, (64, 64)) is None
        assert excluded("lm_head", config, (256, 64)) is not None
    asked = Config(exclude=("*.gate",))
    assert excluded("mlp.gate", asked, (256, 64)) is not None


@pytest.mark.parametrize("name", ["layers.0.mlp.gate_proj", "h.0.attn.c_attn", "head", ""])
def test_others_do_not(name):
    assert excluded(name, Config()) is None


def test_the_reason_names_the_glob():
    assert excluded("a.b", Config(exclude=("x", "a.*"))) == "excluded by name ('a.*')"


def test_globs_match_the_whole_path_and_case():
    config = Config(exclude=("down",))
    assert excluded("mlp.down", config) is None and excluded("Down", config) is None


def test_include_overrides():
    config = Config(exclude=("*",), int8=("a.*",), include=("a.b",))
    assert excluded("a.b", config) is None and not marked_int8("a.b", config)
    assert excluded("a.c", config) is not None and excluded("d", config) is not None


def test_int8_is_no_ternary_weight():
    config = Config(int8=("*embed*",))
    assert "asked for as int8" in excluded("embed", config)
    assert marked_int8("embed", config) and not marked_int8("head", config)


def test_method_decides_the_rounds():
    assert refine_rounds(Config(method="rtn")) == 0 < refine_rounds(Config(method="als"))
    assert refine_rounds(Config()) == refine_rounds(Config(method="als"))


OFFLINE = [
    ("method", "gptq", "method='a(uto|ls)'"),
    ("bits_budget", 2.0, "error_budget"),
    ("tie_scales", False, "tie_scales=True"),
]


@pytest.mark.parametrize(("field", "value", "instead"), OFFLINE)
def test_the_backend_refuses_what_belongs_to_quantize(field, value, instead):
    with pytest.raises(ConfigError, match=f"{field}=.*ternc.quantize.*{instead}"):
        refuse_live(Config(**{field: value}))


@pytest.mark.parametrize(("field", "value", "instead"), OFFLINE)
def test_quantize_refuses_what_needs_calibration_data(field, value, instead):
    config = Config(**{field: value})
    refuse_offline(config, calibrated=True)
    if field in ("method", "bits_budget"):
        with pytest.raises(ConfigError, match=f"{field}=.*calibration=batches.*{instead}"):
            refuse_offline(config, calibrated=False)
    else:
        refuse_offline(config, calibrated=False)


def test_a_budget_of_bits_chooses_the_planes():
    with pytest.raises(ConfigError, match="planes='auto'"):
        refuse_offline(Config(planes=2, bits_budget=2.5), calibrated=True)


def test_the_rest_is_taken():
    config = Config(planes=1, group_size="tensor", activation_bits=4, rotation="none", method="rtn")
    refuse_live(config)
    refuse_offline(config, calibrated=False)
