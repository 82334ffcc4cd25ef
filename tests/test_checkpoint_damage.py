"""save is atomic; load is safe against whatever is in the folder."""

import copy
import hashlib
import json
import os
import shutil

import pytest
import torch
from checkpoints import Net, assert_equal_models, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ternc import checkpoint
from ternc.checkpoint import MANIFEST, WEIGHTS, load, save
from ternc.errors import CheckpointError, UnsupportedModelError


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    save(make(), folder)
    return folder


# Atomic writing.


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_a_failed_save_leaves_the_old_one(saved, monkeypatch, fail_at):
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)
    calls = 0
    replace = os.replace

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError("disk gone")
        replace(*args)

    monkeypatch.setattr(checkpoint.os, "replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        save(make("one plane"), saved)
    assert contents(saved) == before
    assert len(list(saved.iterdir())) == len(before)


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Manifest, "to_json", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        save(make(), tmp_path / "old")
    assert not list((tmp_path / "old").iterdir())


def test_saving_again_replaces(saved):
    q = make("groups")
    save(q, saved)
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS, MANIFEST]
    assert_equal_models(load(saved, Net().eval()), q)


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": object()}

        def set_extra_state(self, state):
            raise AssertionError("never reached")

    with pytest.raises(UnsupportedModelError, match="_extra_state"):
        save(nn.Sequential(Extra(2, 2)), tmp_path / "x")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Folders that are damaged, or hostile.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    save(make(), folder)
    return folder


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([WEIGHTS, MANIFEST]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_one_damaged_byte_is_found_or_harmless(pristine, tmp_path, name, place, change):
    folder = tmp_path / "damaged"
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= change
    (folder / name).write_bytes(data)
    try:
        r = load(folder, Net().eval())
    except CheckpointError:
        return
    assert name == MANIFEST, "every byte of the weights counts"
    expected = make()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, r.state_dict()[key])


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([WEIGHTS, MANIFEST]), st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(pristine, tmp_path, name, place):
    folder = tmp_path / "damaged"
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(place * (len(data) - 1))])
    with pytest.raises(CheckpointError, match=name):
        load(folder, Net().eval())


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(saved, Net())


def test_two_saves_do_not_mix(saved, tmp_path):
    save(make("default", seed=5), tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="of another save"):
        load(saved, Net())


def rewrite(folder, state_changes=None, **fields):
    """Changes a folder as someone would who keeps its own checks consistent."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if state_changes is not None:
        state = {**load_file(folder / WEIGHTS), **state_changes}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_file(state, folder / WEIGHTS, {"format": "pt"})
        manifest["tensors"] = {n: [str(t.dtype), list(t.shape)] for n, t in state.items()}
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        manifest["weights_sha256"] = digest
    for name, change in fields.items():
        manifest[name] = change(manifest[name])
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up.trits": torch.full((3, 40, 7), 250, dtype=torch.uint8)}, r"up\.trits: byte 250"),
        ({"up.trits": torch.zeros(3, 40, 8, dtype=torch.uint8)}, r"up\.trits is .*\[3, 40, 8\]"),
        ({"up.trits": torch.zeros(3, 40, 7)}, r"'up\.trits'|up\.trits is torch.float32"),
        ({"up.scale": torch.zeros(41, dtype=torch.float16)}, "up"),
        ({"up.bias": torch.zeros(41)}, r"up\.bias"),
        ({"up.bias": torch.zeros(40, dtype=torch.int64)}, r"'up\.bias' is torch.int64"),
        ({"up.scale": None}, r"up\.scale is missing"),
        ({"up.trits": None, "up.scale": None, "up.scale_exponent": None}, r"Missing.*up\.trits"),
        ({"extra": torch.zeros(2)}, r"Unexpected.*extra"),
        ({"norm.weight": None}, r"Missing.*norm\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, tensors, message):
    rewrite(saved, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved, Net())
    assert WEIGHTS in str(caught.value)


def changed(path, value):
    """A function that sets a nested key."""

    def change(field):
        field = copy.deepcopy(field)
        inner = field
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return field

    return change


@pytest.mark.parametrize(
    "fields",
    [
        {"format": lambda _: "other"},
        {"format_version": lambda _: 2},
        {"config": lambda _: {"planes": 9}},
        {"config": lambda _: {"unknown": 1}},
        {"config": lambda _: 3},
        {"configs": lambda _: []},
        {"modules": lambda _: []},
        {"modules": changed(["up", "shape"], [40])},
        {"modules": changed(["up", "shape"], [40, -1])},
        {"modules": changed(["up", "shape"], "ab")},
        {"modules": changed(["up", "shape"], [10**15, 10**15])},
        {"modules": changed(["up", "config"], -1)},
        {"modules": changed(["up", "weight_dtype"], "torch.int8")},
        {"modules": changed(["up", "surprise"], 1)},
        {"modules": changed(["up", "bias"], False)},
        {"modules": changed(["up", "bias"], "yes")},
        {"modules": changed(["up", "group_size"], -1)},
        {"modules": changed(["elsewhere"], {})},
        {"modules": lambda m: {**m, "nowhere": m["up"]}},
        {"modules": lambda m: {**m, "norm": m["up"]}},
        {"modules": lambda m: {**m, "embed.weight.data": m["up"]}},
        {"attention": lambda _: ["nowhere"]},
        {"attention": lambda _: [1]},
        {"tensors": changed(["up.bias"], ["torch.float32", [1]])},
        {"tensors": changed(["up.bias"], 3)},
        {"tensors": changed(["up.bias"], [])},
        {"aliases": lambda _: {"lm_head.weight": "nothing"}},
        {"aliases": lambda _: {"up.bias": "down.trits"}},
        {"aliases": lambda _: {"lm_head.weight": ["embed.weight"]}},
        {"rows": lambda _: [{"name": 1}]},
        {"rows": lambda rows: [{**rows[0], "bytes_after": "many"}]},
        {"rows": lambda rows: [{**rows[0], "kernel": {}}]},
        {"buffers": lambda _: ["up.bias"]},
        {"buffers": lambda _: [3]},
        {"builder": lambda _: 7},
        {"weights_sha256": lambda _: None},
    ],
)
def test_manifests_that_make_no_sense_are_refused(saved, fields):
    rewrite(saved, **fields)
    with pytest.raises(CheckpointError, match=MANIFEST.replace(".", r"\.") + "|" + WEIGHTS):
        load(saved, Net())


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": "ternc"}', b"1e999"],
)
def test_garbage_is_refused(saved, text):
    (saved / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(saved, Net())


def test_a_model_of_another_size_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"module 'block\.self_attn|module '"):
        load(saved, Net(width=64))


def test_without_a_skeleton_the_error_says_what_to_pass(saved):
    with pytest.raises(CheckpointError, match=r"pass model=.*Net|Net; pass model="):
        load(saved)
