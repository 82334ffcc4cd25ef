"""Architectures that nobody here wrote, one layer of each: what `make zoo` checks on two."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import zoo
from zoo_models import ZOO

THROUGH_INDUCTOR = ("llama", "bert", "mixtral (experts)", "nanoGPT style")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_architecture(name):
    row = zoo.examine(name, "aot_eager", 1, floats=False)
    assert zoo.misses(row) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_architecture_through_inductor(name):
    row = zoo.examine(name, "inductor", 1, floats=False, lengths=False, training=False)
    assert zoo.misses(row) == []


def test_zoo_is_wide_enough():
    assert len(ZOO) >= 25


def test_misses_are_named():
    row = zoo.examine("nanoGPT style", "eager", 1, floats=False, lengths=False, training=False)
    assert zoo.misses(row) == []
    worse = {"error": 1.0, "breaks added": 2, "compilations": 4, "attention": 0, "unseen": ["a"]}
    words = ("error 1.0e+00", "2 graph breaks", "4 compilations", "0 attention", "['a']")
    for (key, value), word in zip(worse.items(), words, strict=True):
        (miss,) = zoo.misses({**row, key: value})
        assert word in miss
