"""`ternc.bitlinear`: every name, argument and snippet of the page; packed weights are small."""

import copy
import io

import pytest
import torch
from torch import nn

import ternc
import ternc.bitlinear as page
from ternc.bitlinear import (
    BitLinear,
    MultiTernaryLinear,
    PackedBitLinear,
    absmax_scale,
    activation_quant,
    bitlinear_python,
    convert_linear_to_bitlinear,
    estimate_memory_savings,
    greedy_ternary_decomposition,
    memory_report,
    multi_ternary_linear_python,
    pack_ternary_base3,
    ternary_quantize,
    unpack_ternary_base3,
    weight_to_ternary,
)
from ternc.errors import CheckpointError, ConfigError, WeightShapeError

DISTRIBUTIONS = {
    "gauss": lambda *s: torch.randn(*s),
    "uniform": lambda *s: torch.rand(*s) * 2 - 1,
    "laplace": lambda *s: torch.distributions.Laplace(0.0, 1.0).sample(s),
    "student": lambda *s: torch.distributions.StudentT(4.0).sample(s),
}


def rebuilt(planes, gammas):
    return (gammas[..., None] * planes).sum(0)


def test_names_of_the_page():
    for module, names in {
        page: ("BitLinear", "MultiTernaryLinear", "convert_linear_to_bitlinear"),
        page.packing: ("pack_ternary_base3", "unpack_ternary_base3", "estimate_memory_savings"),
        page.functional: ("bitlinear_python", "greedy_ternary_decomposition", "activation_quant"),
        page.quantization: ("absmax_scale", "ternary_quantize", "weight_to_ternary"),
        page.layers: ("BitLinear", "MultiTernaryLinear", "convert_linear_to_bitlinear"),
    }.items():
        for name in names:
            assert callable(getattr(module, name))
    assert all(hasattr(page, name) for name in page.__all__)


def test_snippets():
    layer = BitLinear(in_features=512, out_features=1024, bias=True)
    output = layer(torch.randn(32, 128, 512))
    assert output.shape == (32, 128, 1024) and output.dtype == torch.float32
    assert torch.unique(layer.W_ternary).tolist() == [-1.0, 0.0, 1.0]
    assert layer.W_ternary.shape == (1024, 512) and layer.gamma.shape == (1024,)
    model = nn.TransformerEncoderLayer(d_model=64, nhead=8)
    compressed = convert_linear_to_bitlinear(model, inplace=False)
    assert compressed(torch.randn(10, 32, 64)).shape == (10, 32, 64)
    layer = MultiTernaryLinear(in_features=64, out_features=32, k=3)
    assert layer(torch.randn(2, 64)).shape == (2, 32)
    assert layer.W_ternary.shape == (3, 32, 64) and layer.gammas.shape == (3, 32)
    stats = estimate_memory_savings(512, 1024, num_layers=1)
    assert stats["float32_bytes"] - stats["packed_bytes"] == stats["savings_bytes"]
    assert stats["compression_ratio"] == pytest.approx(19.5, rel=0.02)


@pytest.mark.parametrize("shape", [(512,), (0, 512), (3, 5, 512), (2, 1, 3, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_is_its_reference(shape, dtype):
    layer = BitLinear(512, 33, dtype=dtype)
    x = torch.randn(*shape, dtype=dtype)
    expected = bitlinear_python(x.float(), layer.W_ternary.float(), layer.gamma.float())
    expected = expected + layer.bias.float()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    packed = layer.pack()
    for made in (layer, packed):
        assert torch.allclose(made(x).float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(packed.W_ternary, layer.W_ternary)
    assert torch.allclose(packed.weight.float(), layer.values().float(), rtol=1e-2)
    wide = torch.randn(512, 7, dtype=dtype).t()
    assert not wide.is_contiguous() and layer(wide).shape == (7, 33)


def test_master_weight_learns():
    layer = BitLinear(64, 8)
    x, target = torch.randn(256, 64), torch.randn(256, 8)
    before = layer.W_ternary
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert (layer.W_ternary != before).any()
    assert layer.W_ternary.unique().tolist() == [-1.0, 0.0, 1.0]


def test_packed_bytes_are_what_is_held():
    layer = BitLinear(512, 512, bias=False).pack()
    weights = layer.state_dict()
    assert weights["trits"].dtype == torch.uint8
    assert 8 * sum(t.nbytes for t in weights.values()) / 512**2 <= 1.65
    file = io.BytesIO()
    torch.save(weights, file)
    assert 8 * file.tell() / 512**2 <= 1.75
    held = memory_report(layer)
    assert held["parameters"] == 0 and 8 * held["total"] / 512**2 <= 2.07


def test_conversion():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    converted = convert_linear_to_bitlinear(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in converted] == [PackedBitLinear, nn.ReLU, PackedBitLinear]
    rows = ternc.report(converted).rewritten
    assert len(rows) == 2 and all(0.3 < row.weight_error < 0.5 for row in rows)
    assert type(convert_linear_to_bitlinear(converted)[0]) is PackedBitLinear
    root = convert_linear_to_bitlinear(nn.Linear(32, 16))
    assert isinstance(root, PackedBitLinear) and ternc.report(root).rewritten
    assert convert_linear_to_bitlinear(model, inplace=True) is model
    kept = convert_linear_to_bitlinear(nn.ModuleDict({"lm_head": nn.Linear(8, 8)}))
    assert type(kept["lm_head"]) is nn.Linear


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_no_converted_layer_is_bypassed(mode, training):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    model = convert_linear_to_bitlinear(encoder).train(training)
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedBitLinear):
            calls[name] = 0
            module.register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    assert len(calls) == 12
    with mode():
        model(torch.randn(2, 5, 32))
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_multi_ternary_layer_is_its_reference(k):
    layer = MultiTernaryLinear.from_linear(nn.Linear(96, 40), k)
    x = torch.randn(6, 96)
    expected = multi_ternary_linear_python(x, layer.W_ternary, layer.gammas, layer.bias)
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer.pack()(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(40, 96), rtol=1e-4, atol=1e-4)
    assert len(layer.W_ternary) == k


@pytest.mark.parametrize("method", ["balanced", "greedy", "als"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_falls_with_every_plane(name, method):
    w = DISTRIBUTIONS[name](24, 512)
    errors = []
    for k in (1, 2, 3, 4):
        planes, gammas = greedy_ternary_decomposition(w, k, method=method)
        assert planes.shape == (k, 24, 512) and gammas.shape == (k, 24)
        assert set(planes.unique().tolist()) <= {-1.0, 0.0, 1.0}
        errors.append(((rebuilt(planes, gammas) - w).norm() / w.norm()).item())
    assert errors == sorted(errors, reverse=True)
    if name == "gauss" and method != "greedy":
        assert errors[0] <= 0.44 and errors[1] <= 0.18 and errors[2] <= 0.07
    if method == "als":
        planes, gammas = greedy_ternary_decomposition(w, 3)
        assert errors[2] <= ((rebuilt(planes, gammas) - w).norm() / w.norm()).item() + 1e-6


def test_decomposition_of_odd_weights():
    zeros = torch.zeros(3, 40)
    zeros[1] = torch.randn(40)
    for method in ("balanced", "greedy", "als"):
        planes, gammas = greedy_ternary_decomposition(zeros, 2, method=method)
        assert rebuilt(planes, gammas)[[0, 2]].abs().max() == 0
        assert gammas.isfinite().all()
    with pytest.raises(WeightShapeError, match="finite"):
        greedy_ternary_decomposition(torch.full((2, 2), torch.nan), 1)
    with pytest.raises(ConfigError, match="k=0"):
        greedy_ternary_decomposition(zeros, 0)
    with pytest.raises(ConfigError, match="method='svd'"):
        greedy_ternary_decomposition(zeros, 1, method="svd")


@pytest.mark.parametrize("shape", [(4, 20), (3, 7), (2, 3, 11), (1, 1)])
def test_packing_round_trip(shape):
    trits = torch.randint(-1, 2, shape).float()
    packed, kept = pack_ternary_base3(trits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] // 5))
    assert torch.equal(unpack_ternary_base3(packed, kept), trits)
    first = sum((int(t) + 1) * 3**i for i, t in enumerate(trits.flatten()[: min(5, shape[-1])]))
    pad = sum(3**i for i in range(min(5, shape[-1]), 5))
    assert int(packed.flatten()[0]) == first + pad


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(WeightShapeError, match="other values"):
        pack_ternary_base3(torch.tensor([[0.5]]))
    with pytest.raises(CheckpointError, match=r"243|255"):
        unpack_ternary_base3(torch.full((1, 1), 255, dtype=torch.uint8), (1, 5))
    with pytest.raises(WeightShapeError, match="wanted uint8"):
        unpack_ternary_base3(torch.zeros(1, 2, dtype=torch.uint8), (1, 5))


def test_quantisers():
    w = torch.randn(64, 1024)
    assert absmax_scale(w).shape == () and absmax_scale(w, dim=1).shape == (64, 1)
    assert absmax_scale(torch.zeros(3)).item() == pytest.approx(1e-5)
    errors = {}
    for method in ("least_squares", "absmean", "absmax"):
        trits, gamma = weight_to_ternary(w, method=method)
        assert gamma.shape == (64,)
        errors[method] = ((gamma[:, None] * trits - w).norm() / w.norm()).item()
    assert errors["least_squares"] < errors["absmean"] < errors["absmax"]
    assert errors["least_squares"] == pytest.approx(0.436, rel=0.02)
    assert (ternary_quantize(w, absmax_scale(w)) == 0).float().mean() > 0.9
    assert 0.3 < (ternary_quantize(w) == 0).float().mean() < 0.6
    x = torch.randn(5, 64, requires_grad=True)
    quantized = activation_quant(x)
    step = x.abs().amax(1, keepdim=True) / 127
    assert torch.allclose((quantized / step).round() * step, quantized, atol=1e-5)
    quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
