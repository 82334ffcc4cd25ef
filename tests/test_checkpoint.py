"""save and load: bit for bit, tied, with buffers, hooks and modes."""

import copy

import pytest
import torch
from checkpoints import CONFIGS, IDS, Net, assert_equal_models, make
from safetensors.torch import load_file
from torch import nn

from ternc.checkpoint import WEIGHTS, load, save
from ternc.config import Config
from ternc.errors import CheckpointError
from ternc.inspection import report
from ternc.quantization import quantize


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    save(make(), folder)
    return folder


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


def test_a_compiled_model_is_the_model_inside(tmp_path):
    """By quantize, save and load: names in files and reports are those of the user's modules."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    x, options = torch.randn(3, 64), {"inner": "eager"}
    fast = torch.compile(model, backend="ternc", options=options)
    with torch.no_grad():
        fast(x)
        q = quantize(fast)
        assert type(q) is nn.Sequential and type(model[0]) is nn.Linear
        assert [row.name for row in report(q).rows] == ["0", "2"]
        again = torch.compile(q, backend="ternc", options=options)
        again(x)
        save(again, tmp_path)
        assert [row.name for row in report(again).rows] == ["0", "2"]
        plain = load(tmp_path, model=copy.deepcopy(model))
        assert torch.equal(plain(x), q(x))
        compiled = torch.compile(copy.deepcopy(model), backend="ternc", options=options)
        assert load(tmp_path, model=compiled) is compiled
        assert torch.equal(compiled(x), q(x))


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
