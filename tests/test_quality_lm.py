"""The language-model benchmark at the size of a test: every row, and going on with a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("quality_lm", FOLDER / "quality_lm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality_lm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_every_row_is_made_once_and_a_call_goes_on(benchmark, tmp_path):
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt").write_text(
            "the cat sat on the mat and the dog sat on it\n" * 60
        )
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--smoke", "--device", "cpu"]
    arguments += ["--seconds", "0.5", "--sequences", "8", "--bytes", "300"]
    run = [*arguments, "--only", "float", "--only", "ternc + reconstruction 1"]
    assert benchmark.main(run) == 0
    first = json.loads((out / benchmark.RECORD).read_text())
    assert list(first["rows"]) == ["float", "ternc + reconstruction 1"]
    assert benchmark.main(arguments) == 0
    result = json.loads((out / benchmark.RECORD).read_text())
    assert all(result["rows"][key] == row for key, row in first["rows"].items())
    assert len(result["rows"]) == 25
    scores = {key: row["bits_per_byte"]["valid"] for key, row in result["rows"].items()}
    assert scores["float"] < scores["ternc rtn, no data 1"] < scores["greedy 1"] + 1
    kl = {key: row["kl"] for key, row in result["rows"].items()}
    assert kl["float"] == 0 < kl["ternc 3"] < kl["ternc 2"] < kl["ternc 1"] < kl["greedy 1"]
    bits = {key: round(row["bits"], 2) for key, row in result["rows"].items()}
    assert bits["int gptq 3"] == 3.15 and 1.6 < bits["ternc 1"] < bits["ternc 2"] < bits["ternc 3"]
    table = (out / "quality_lm.md").read_text()
    assert all(f"| {row['method']} " in table for row in result["rows"].values())
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.main([*arguments[:-4], "--seconds", "9"])
