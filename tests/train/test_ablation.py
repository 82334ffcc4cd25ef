"""The ablation harness at the size of a test: the order of its arms, and going on with a run."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from training import chain

SOURCE = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation", SOURCE)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["ablation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(ablation, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.txt").write_bytes(chain(300_000, seed=5))
    (folder / "valid.txt").write_bytes(chain(40_000, seed=6))
    return ablation.read(folder, [])


@pytest.mark.slow
def test_order_of_the_arms(ablation, corpus, tmp_path):
    """Mean over three seeds of packed models, each family at the better of two learning rates."""
    settings = ablation.Settings.smoke()
    results = ablation.run_all(corpus, settings, tmp_path / "out", arms=ablation.RATED)
    mean = {}
    for arm in ablation.RATED:
        scores = {}
        for result in results.values():
            if result["arm"].split("@")[0] == arm:
                known = scores.get(result["seed"], math.inf)
                scores[result["seed"]] = min(known, result["bits_per_byte"]["valid"])
        assert sorted(scores) == [0, 1, 2]
        mean[arm] = sum(scores.values()) / 3
    torch.manual_seed(0)
    untrained = ablation.score(ablation.new_model(settings), corpus, settings)["valid"]
    print(mean, untrained)
    assert mean["float"] < mean["bitnet"] < untrained
    assert mean["full"] <= mean["bitnet"] + 0.01
    table = ablation.table(results, settings.seeds)
    assert "| bitnet |" in table and "standard deviation over 3 seeds" in table


def test_every_arm_runs_and_goes_on(ablation, corpus, tmp_path):
    """All arms, a few steps; a call without time leaves a checkpoint that the next one takes up."""
    import dataclasses

    small = dataclasses.replace(
        ablation.Settings.smoke(), width=32, layers=1, hidden=48, context=32, steps=4, windows=4,
        rates=(3e-3,), seeds=(0,), parts=2,
    )  # fmt: skip
    out = tmp_path / "out"
    assert ablation.run_all(corpus, small, out, deadline=0.0) == {}
    results = ablation.run_all(corpus, small, out)
    assert {result["arm"].split("@")[0] for result in results.values()} == set(ablation.recipes())
    assert all(0 < r["bits_per_byte"]["valid"] < 20 for r in results.values())
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert ablation.run_all(corpus, small, out).keys() == results.keys()
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    # One arm, interrupted in the middle, ends where the uninterrupted one did.
    name = next(name for name in results if name.startswith("full@"))
    config = ablation.with_rate(ablation.recipes()["full"], 3e-3, 0, small)
    teacher = ablation.teacher_of(config, small, out)
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(ablation.OutOfTime):
        ablation.run_arm(name, config, corpus, small, 0, again, teacher, deadline=0.0)
    resumed = ablation.run_arm(name, config, corpus, small, 0, again, teacher)
    assert resumed["bits_per_byte"] == results[name]["bits_per_byte"]
