"""Store: decisions come back bit for bit; damage and other runs are refused."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import random_quantized

import ternc
from ternc.calibration.distance import default_loss
from ternc.calibration.identity import identity
from ternc.calibration.resume import PLANES, RUN, Store, fingerprint
from ternc.calibration.tune import Tuning
from ternc.config import Config
from ternc.errors import CheckpointError
from ternc.formats.rotation import Rotation
from ternc.site import Decision

CPU = torch.device("cpu")
HERE = Path(__file__).parent
OTHERS = ("second", "resumed")
CONFIG = Config(planes=2, method="als", rotation="none")


def decisions():
    return {
        "a": Decision(
            random_quantized(5, 40, 2, 16), "why", 0.1234567890123, 1 / 3, Rotation(8, -(2**62))
        ),
        "b": Decision(random_quantized(3, 40, 1, 16, "free"), "free", bias=torch.randn(3).half()),
        "c": Decision(None, "over the budget", output_error=0.5),
    }


def test_decisions_come_back_as_they_were(tmp_path):
    store, written = Store(tmp_path, {"run": 1}), decisions()
    assert store.read(list(written), CPU) is None
    store.write(written)
    found = Store(tmp_path, {"run": 1}).read(list(written), CPU)
    assert list(found) == list(written)
    for name, wanted in written.items():
        one = found[name]
        for field in ("reason", "error", "output_error", "rotation"):
            assert getattr(one, field) == getattr(wanted, field)
        assert (one.bias is None) == (wanted.bias is None)
        assert wanted.bias is None or torch.equal(one.bias, wanted.bias)
        if wanted.quantized is None:
            assert one.quantized is None
            continue
        for field in ("codes", "scale", "multiplier", "group_size", "planes", "exact"):
            new, old = getattr(one.quantized, field), getattr(wanted.quantized, field)
            assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old


def test_a_damaged_file_is_refused(tmp_path):
    store = Store(tmp_path, {})
    store.write(decisions())
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        store.read(list("abc"), CPU)
    (tmp_path / RUN).write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Store(tmp_path, {})


def test_another_run_is_refused(tmp_path):
    Store(tmp_path, {"model": "x", "planes": 1})
    Store(tmp_path, {"model": "x", "planes": 1})
    with pytest.raises(CheckpointError, match="other planes"):
        Store(tmp_path, {"model": "x", "planes": 2})


def test_allocated_planes_come_back(tmp_path):
    store = Store(tmp_path, {})
    assert store.read_planes("ab") is None
    store.write_planes({"a": 1, "b": 3})
    assert Store(tmp_path, {}).read_planes("ab") == {"a": 1, "b": 3}
    for text in ("[", "7", '{"a": 1}', '{"a": 1, "b": 9}', '{"a": 1, "b": [2]}'):
        (tmp_path / PLANES).write_text(text)
        with pytest.raises(CheckpointError, match=r"planes\.json is damaged"):
            store.read_planes("ab")


def test_the_fingerprint_sees_weights_data_and_settings():
    model, batches = torch.nn.Linear(3, 2), [torch.randn(4, 3)]
    found = functools.partial(fingerprint, loss=default_loss)
    first = found(model, Config(), batches)
    assert found(model, Config(), batches) == first == json.loads(json.dumps(first))
    assert found(model, Config(seed=1), batches)["configuration"] != first["configuration"]
    assert found(model, Config(), [batches[0] + 1])["calibration"] != first["calibration"]
    assert first["loss"] is None, "it allocates nothing"
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert found(model, Config(), batches)["model"] != first["model"]


def scaled(factor):
    return lambda output, target, batch: factor * (output - target).abs().mean()


def test_a_loss_is_known_by_its_code_and_what_it_was_made_with():
    losses = [
        default_loss, scaled(1), scaled(2), functools.partial(default_loss, batch=1),
        functools.partial(default_loss, batch=2), torch.nn.MSELoss(), torch.nn.L1Loss(),
        lambda output, target, batch: (output - target).norm(),
        lambda output, target, batch: output in {"a", "b", "c"},
    ]  # fmt: skip
    names = [identity(loss) for loss in losses]
    assert len(set(names)) == len(losses)
    assert identity(scaled(2)) == names[2]


def test_planes_of_another_loss_are_refused(tmp_path):
    model, batches = build(), inputs()
    config = Config(bits_budget=3.0, group_size=16, method="als", rotation="none")
    ternc.quantize(model, config, calibration=batches, resume=tmp_path)
    ternc.quantize(model, config, calibration=batches, resume=tmp_path)
    with pytest.raises(CheckpointError, match="other loss"):
        ternc.quantize(model, config, calibration=batches, resume=tmp_path, loss=scaled(1))


def build():
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()) for _ in range(6)]
    return torch.nn.Sequential(*blocks).eval()


def inputs():
    return list(torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(1)))


KILLED = """
import sys, time
import ternc
from ternc.calibration import resume
from test_resume import CONFIG, build, inputs
write = resume.Store.write
def slow(store, decisions):
    write(store, decisions)
    print("written", flush=True)
    time.sleep(60 if len(list(store._folder.glob("*.safetensors"))) == 3 else 0)
resume.Store.write = slow
ternc.quantize(build(), CONFIG, calibration=inputs(), resume=sys.argv[1])
"""


def test_a_killed_process_is_taken_up_with_the_same_files(tmp_path):
    """Nothing can be tidied up on SIGKILL; half a file may lie there too."""
    kept = tmp_path / "kept"
    paths = os.pathsep.join([*map(str, (HERE.parents[1], HERE.parent, HERE)), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(kept)],
        env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines = [child.stdout.readline() for _ in range(3)]
    finally:
        child.kill()
        child.communicate()
    assert lines == ["written\n"] * 3 and child.returncode == -signal.SIGKILL
    found = sorted(kept.glob("*.safetensors"))
    assert len(found) == 3
    (kept / f".{found[0].name}.{child.pid}").write_bytes(found[0].read_bytes()[:50])
    settings = {"config": CONFIG, "calibration": inputs(), "tuning": Tuning(epochs=1)}
    ternc.save(ternc.quantize(build(), **settings, resume=kept), tmp_path / "resumed")
    assert len(list(kept.glob("[!.]*.safetensors"))) == 6
    for name in ("first", "second"):
        ternc.save(ternc.quantize(build(), **settings), tmp_path / name)
    for file in sorted((tmp_path / "first").iterdir()):
        data = file.read_bytes()
        assert all((tmp_path / name / file.name).read_bytes() == data for name in OTHERS), file
