"""save and load: bit for bit, tied, atomic, and safe against whatever is in the folder."""

import copy
import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ternc import checkpoint
from ternc.checkpoint import MANIFEST, WEIGHTS, load, save
from ternc.config import Config
from ternc.errors import CheckpointError, UnsupportedModelError
from ternc.quantization import quantize


class Net(nn.Module):
    """A bit of everything: linears, one over the budget, attention, a tied pair, buffers."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, ids):
        x = self.down(self.up(self.block(self.embed(ids))).relu())
        x = self.norm((self.second(self.first(x)) + x).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)
CONFIGS = {
    "default": Config(),
    "one plane": Config(planes=1, group_size=None),
    "groups": Config(planes=2, group_size=16, activation_bits=None),
    "tensor": Config(planes=2, group_size="tensor"),
    "partly": Config(exclude=("*.q_proj", "up", "block.linear1")),
}


def make(config="default", seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.down.weight.data = 0.2 * torch.randint(-1, 2, (32, 40)).float()
    return quantize(model, CONFIGS[config])


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    save(make(), folder)
    return folder


def assert_equal_models(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(a(IDS), b(IDS))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("skeleton", ["float", "packed"])
def test_reload_is_bit_exact(tmp_path, config, skeleton):
    """Seeds, acceptance 10: state and logits."""
    q = make(config)
    save(q, tmp_path)
    packed = "partly" if config == "partly" else "groups"
    model = Net().eval() if skeleton == "float" else make(packed, seed=1)
    r = load(tmp_path, model)
    assert r is model
    assert_equal_models(q, r)
    assert r.down.exact and not r.first.exact
    assert [type(m) for m in r.modules()] == [type(m) for m in q.modules()]
    assert r._ternc_rows == q._ternc_rows and r._ternc_config == q._ternc_config


def test_a_packed_layer_is_not_refitted_from_a_float_weight(tmp_path):
    save(make("partly"), tmp_path)
    with pytest.raises(CheckpointError, match=r"'block\.self_attn\.q_proj' is packed in the model"):
        load(tmp_path, make())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_come_from_the_folder(tmp_path, dtype):
    torch.manual_seed(0)
    q = quantize(Net().eval().to(dtype))
    save(q, tmp_path)
    assert_equal_models(q, load(tmp_path, Net().eval()))


def test_tied_weights_stay_tied_and_are_stored_once(saved):
    names = set(load_file(saved / WEIGHTS))
    assert {"embed.weight", "lm_head.weight"} & names == {"embed.weight"}
    assert "first.trits" in names and "second.trits" not in names and "second.bias" in names
    r = load(saved, Net())
    assert r.lm_head.weight is r.embed.weight
    assert r.first.packed_weight is r.second.packed_weight
    assert r.first.scale is r.second.scale


def test_a_skeleton_that_is_not_tied_becomes_tied(saved):
    model = Net()
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    model.second = nn.Linear(32, 32)
    r = load(saved, model)
    assert r.lm_head.weight is r.embed.weight
    assert r.first.packed_weight is r.second.packed_weight


def test_meta_skeleton(saved):
    with torch.device("meta"):
        model = Net().eval()
    r = load(saved, copy.deepcopy(model))
    assert_equal_models(r, make())
    assert r.up.bias.requires_grad and torch.equal(r.mask, make().mask)
    model.register_buffer("late", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"'late' .*meta device"):
        load(saved, model)


def test_buffers_that_no_state_dict_has_come_back(tmp_path):
    q = make().half()
    q.mask.copy_(torch.tensor([1.0, 2.0, 3.0]))
    save(q, tmp_path)
    r = load(tmp_path, Net().eval())
    assert r.mask.dtype == torch.float16 and torch.equal(r.mask, q.mask)
    assert "mask" not in r.state_dict()


def test_loading_in_inference_mode_gives_ordinary_tensors(saved):
    with torch.inference_mode():
        r = load(saved, Net())
    assert not any(t.is_inference() for t in (*r.parameters(), *r.buffers()))


def test_a_shared_module_is_one_again(tmp_path):
    shared = nn.Linear(8, 8)
    q = quantize(nn.Sequential(shared, nn.ReLU(), shared))
    save(q, tmp_path)
    other = nn.Linear(8, 8)
    r = load(tmp_path, nn.Sequential(other, nn.ReLU(), other))
    assert r[0] is r[2]
    x = torch.randn(3, 8)
    assert torch.equal(r(x), q(x))


def test_hooks_and_modes_of_the_skeleton_survive(saved):
    model = Net().eval()
    model.up.train()
    seen = []
    for module in (model.up, model.block.self_attn):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    r = load(saved, model)
    r(IDS)
    assert seen == ["TernaryMultiheadAttention", "TernaryLinear"]
    assert r.up.training and not r.first.training and not r.block.self_attn.training


def test_a_root_that_is_a_layer(tmp_path):
    q = quantize(nn.Linear(8, 6))
    save(q, tmp_path)
    r = load(tmp_path, nn.Linear(8, 6))
    x = torch.randn(3, 8)
    assert torch.equal(r(x), q(x))
    attention = quantize(nn.MultiheadAttention(8, 2))
    save(attention, tmp_path)
    r = load(tmp_path, nn.MultiheadAttention(8, 2))
    assert torch.equal(r(x, x, x)[0], attention(x, x, x)[0])


def test_a_float_model_is_saved_as_it_is(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    save(model, tmp_path)
    r = load(tmp_path, nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(r[0].weight, model[0].weight) and type(r[0]) is nn.Linear


def test_the_fast_path_is_off_after_loading(saved):
    r = load(saved, Net().eval())
    assert r.block.activation_relu_or_gelu == 0


def test_one_plane_file_size(tmp_path):
    """Seeds, acceptance 1: the file, header and scales included."""
    q = quantize(nn.Linear(2048, 2048, bias=False), Config(planes=1, group_size=None))
    save(q, tmp_path)
    assert 8 * (tmp_path / WEIGHTS).stat().st_size / 2048**2 <= 1.65


def test_views_of_one_memory_are_stored_apart(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(8)
            self.register_buffer("a", whole[:6])
            self.register_buffer("b", whole[2:])

    model = Views()
    save(model, tmp_path)
    r = load(tmp_path, Views())
    assert torch.equal(r.a, model.a) and torch.equal(r.b, model.b)


def test_loading_does_not_map_the_file(saved):
    r = load(saved, Net().eval())
    before = copy.deepcopy(r.state_dict())
    size = (saved / WEIGHTS).stat().st_size
    with (saved / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(before[name], tensor) for name, tensor in r.state_dict().items())


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
