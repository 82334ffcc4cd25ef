"""Store: decisions come back bit for bit; damage and other runs are refused."""

import json

import pytest
import torch
from reference import random_quantized

from ternc.calibration.resume import PLANES, RUN, Store, fingerprint
from ternc.config import Config
from ternc.errors import CheckpointError
from ternc.formats.rotation import Rotation
from ternc.site import Decision

CPU = torch.device("cpu")


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
    first = fingerprint(model, Config(), batches)
    assert fingerprint(model, Config(), batches) == first == json.loads(json.dumps(first))
    assert fingerprint(model, Config(seed=1), batches)["configuration"] != first["configuration"]
    assert fingerprint(model, Config(), [batches[0] + 1])["calibration"] != first["calibration"]
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model, Config(), batches)["model"] != first["model"]
