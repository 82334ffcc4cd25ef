"""The ablation harness at the size of a test: the order of its arms, and going on with a run."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from training import chain

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import ablation
import ablation_arm
import ablation_plan
import ablation_queue
import ablation_table
from ablation_data import Windows, bits_per_byte, read, tensor_of
from ablation_teacher import export_teacher, import_teacher


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_bytes(chain(300_000, seed=5))
    (folder / "valid.txt").write_bytes(chain(40_000, seed=6))
    return read(folder, [])


SMALL = dataclasses.replace(
    ablation_plan.Settings.smoke(), width=32, layers=1, hidden=48, context=32, steps=4, windows=4,
    rates=(3e-3,), controls=(1e-3,), seeds=(0,), parts=2, longer=6,
)  # fmt: skip


@pytest.mark.slow
def test_order_of_the_arms(corpus, tmp_path):
    """Mean over three seeds of packed models, each family at the better of two learning rates."""
    settings = ablation_plan.Settings.smoke()
    results = ablation_queue.run_all(corpus, settings, tmp_path, arms=ablation_plan.RATED)
    mean = {}
    for arm in ablation_plan.RATED:
        found = ablation_table.per_seed(results, arm)
        assert sorted(found) == [0, 1, 2]
        mean[arm] = sum(result["bits_per_byte"]["valid"] for result in found.values()) / 3
    torch.manual_seed(0)
    untrained = ablation_arm.score(ablation_arm.new_model(settings), corpus, settings)["valid"]
    print(mean, untrained)
    assert mean["float"] < mean["bitnet"] < untrained
    assert mean["full"] <= mean["bitnet"] + 0.01
    table = ablation_table.table(results)
    assert "| bitnet |" in table and "standard deviation between seeds" in table


def test_every_arm_runs_and_goes_on(corpus, tmp_path):
    """All arms, a few steps; a call without time leaves a checkpoint that the next one takes up."""
    out = tmp_path / "out"
    arms = (*ablation_plan.recipes(), *ablation_plan.PTQ)
    assert ablation_queue.run_all(corpus, SMALL, out, deadline=0.0) == {}
    results = ablation_queue.run_all(corpus, SMALL, out, arms=arms)
    assert [path.read_text() for path in out.glob("*.error")] == []
    assert {result["arm"] for result in results.values()} == set(arms)
    assert all(0 < r["bits_per_byte"]["valid"] < 20 for r in results.values())
    assert not any(r.get("graphs_compiled_after_first_row") for r in results.values())
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert ablation_queue.run_all(corpus, SMALL, out, arms=arms).keys() == results.keys()
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    # One arm, interrupted in the middle, ends where the uninterrupted one did.
    job = next(job for job in ablation_plan.plan(SMALL) if job.arm == "full")
    (out / f"{job.key}.json").unlink()
    with pytest.raises(ablation_arm.OutOfTime):
        ablation_arm.run_job(job, corpus, SMALL, out, deadline=0.0)
    again = ablation_arm.run_job(job, corpus, SMALL, out)
    assert again["bits_per_byte"] == results[job.key]["bits_per_byte"]
    # Another machine goes on with the exported files alone.
    ablation.export(out, tmp_path / "files", SMALL)
    ablation.carry_on(tmp_path / "files", tmp_path / "other", SMALL)
    assert ablation_plan.read_results(tmp_path / "other").keys() == results.keys()
    here, there = (ablation_arm.load_teacher(SMALL, tmp_path / name) for name in ("out", "other"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(here(torch.arange(9)[None]), there(torch.arange(9)[None]))
    short, long = ablation_table.lengths(results)
    assert {result["arm"] for result in long.values()} == set(ablation_plan.LONGER)
    assert {result["steps"] for result in long.values()} == {6}
    # Changes of an arm and their teacher stay off the control, whatever its score.
    rates = {result["arm"]: result["rate"] for result in short.values() if "@" not in result["key"]}
    assert set(rates.values()) == {3e-3}
    lines = ablation_table.table(short).splitlines()
    assert sum(line.startswith("| full") for line in lines) == 13
    for switch in ablation_table.SWITCHES:
        value = ablation_table.effect(short, switch)
        assert any(f"| {switch.name} |" in line and f" {value:+.4f} |" in line for line in lines)
    pages = "\n".join(ablation_table.longer(results))
    assert "## The same, 6 steps" in pages and "| full-dead_zone | `full` |" in pages


def test_means_and_effects():
    """Gaps and effects are between means of seeds."""
    scores = {"float": (1.0, 1.2), "bitnet": (1.3, 1.5), "full": (1.10, 1.14), "full-kl": (1.20,)}
    results = {
        f"{arm}-s{seed}": {
            "arm": arm, "seed": seed, "rate": 1e-3, "bits_per_byte": {"tune": 1.0, "valid": value}
        }
        for arm, values in scores.items() for seed, value in enumerate(values)
    }  # fmt: skip
    table = ablation_table.table(results)
    assert "| full |  | 0.001 | 2 | 1.1200 | +0.0200 | 93% |" in table
    assert "Float is 0.3000 bits per byte better than BitNet b1.58 (0.3000 at the first" in table
    deviation = ablation_table.seed_deviation(results)
    assert deviation == pytest.approx(((0.02 + 0.02 + 0.0008) / 3) ** 0.5)
    (switch,) = (s for s in ablation_table.SWITCHES if (s.on, s.off) == ("full", "full-kl"))
    assert ablation_table.effect(results, switch) == pytest.approx(1.12 - 1.20)
    said = [ablation_table.verdict(v, 0.04) for v in (-0.1, -0.07, 0.1)]
    assert said == ["helps", "within noise", "harms"]


def test_teacher_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr("ablation_teacher.PIECE", 1000)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 8), torch.nn.Linear(8, 96), torch.nn.RMSNorm(9)
    )
    paths = export_teacher(model, tmp_path)
    assert len(paths) > 1 and all(path.stat().st_size <= 1000 for path in paths)
    state, own = import_teacher(tmp_path), model.state_dict()
    assert state.keys() == own.keys()
    for name, value in own.items():
        expected = value.bfloat16().float() if name == "1.weight" else value
        assert torch.equal(state[name], expected)


def test_queue(tmp_path):
    """Needs come first, a claimed job is left to others, a failure stops nothing but its users."""
    jobs = [
        ablation_plan.Job("c-s0", "c", 0, None, needs=("a@1-s0", "a@2-s0")),
        ablation_plan.Job("d-s0", "d", 0, None, needs=("a@1-s0", "b@1-s0")),
        ablation_plan.Job("a@1-s0", "a", 0, 1.0),
        ablation_plan.Job("a@2-s0", "a", 0, 2.0),
        ablation_plan.Job("b@1-s0", "b", 0, 1.0),
        ablation_plan.Job("e-s0", "e", 0, 1.0),
    ]
    (tmp_path / "e-s0.claim").touch()
    order = []

    def run(job):
        order.append(job.key)
        if job.key in ("a@2-s0", "b@1-s0"):
            raise ValueError("no such thing")
        (tmp_path / f"{job.key}.json").write_text("{}")
        if job.key == "c-s0":  # the other process ends as well
            (tmp_path / "e-s0.json").write_text("{}")

    assert ablation_queue.work(jobs, tmp_path, run)
    assert order == ["a@1-s0", "a@2-s0", "c-s0", "b@1-s0"]
    assert "no such thing" in (tmp_path / "b@1-s0.error").read_text()
    assert [path.name for path in tmp_path.glob("*.claim")] == ["e-s0.claim"]
    assert ablation_queue.work(jobs, tmp_path, run, deadline=-math.inf) is True


def test_gpu_of_a_process(monkeypatch):
    """Only the GPUs that the call may use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert [ablation_queue.gpu_of(index) for index in range(3)] == ["1", "3", "1"]


def test_parts_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 1000)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "b.txt").write_bytes(b"bc" * 200)
    (tmp_path / "other.txt").write_bytes(b"d" * 300)
    corpus = read(tmp_path, [])
    assert set(corpus.scored) == {"tune", "valid"}
    assert bytes(corpus.scored["valid"].tolist()) == b"bc" * 200 + b"\n"
    assert len(corpus.train) + len(corpus.scored["tune"]) == 1302
    batches = list(Windows(corpus.train, 3, 8, 4, seed=1))
    assert len(batches) == 4 and batches[0].shape == (3, 9)

    class Uniform(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 256)

    text = tensor_of(b"any text at all, long enough", "cpu")
    assert bits_per_byte(Uniform(), text, 8, 100, 2) == pytest.approx(8.0)
