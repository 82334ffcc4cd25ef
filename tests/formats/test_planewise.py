"""Free scales of several planes: side by side and back, and the product that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from reference import random_quantized

import ternc
from ternc.config import CODE_MAX, Config
from ternc.errors import ConfigError, WeightShapeError
from ternc.formats import pack, unpack
from ternc.formats.fit import refuse
from ternc.formats.planewise import spread_input
from ternc.formats.planewise_fit import fit_scales, levels_of, nearest
from ternc.formats.quantized import expand_groups
from ternc.formats.trits import planes_of
from ternc.modules.embedding import TernaryEmbedding
from ternc.modules.linear import TernaryLinear

CASES = [(6, 24, 2, 8), (7, 50, 3, 16), (65, 130, 2, 128), (3, 36, 3, 4)]
"""(N, K, planes, group size); in the second and third the last group is short."""


def by_definition(quantized):
    """fp64 [N, K]."""
    planes = planes_of(quantized.codes, quantized.planes).double()
    scales = quantized.scale.double().permute(2, 0, 1)
    size, columns = quantized.group_size, quantized.shape[1]
    return sum(expand_groups(s, size, columns) * t for s, t in zip(scales, planes, strict=True))


@pytest.mark.parametrize("planes", CODE_MAX)
def test_trits_of_every_code(planes):
    codes = torch.arange(-CODE_MAX[planes], CODE_MAX[planes] + 1, dtype=torch.int8)[None]
    trits = planes_of(codes, planes)
    places = 3 ** torch.arange(planes - 1, -1, -1)
    assert torch.equal((places[:, None, None] * trits).sum(0), codes.long())
    assert trits.abs().max() == 1 and len({tuple(t) for t in trits[:, 0].T.tolist()}) == 3**planes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", ["cpu", "cuda", 1])
def test_packing_is_lossless(case, target):
    quantized = random_quantized(*case, "planes")
    packed = pack(quantized, target)
    assert packed.planes == case[2] and packed.shape == case[:2]
    back = unpack(packed)
    assert torch.equal(back.codes, quantized.codes) and torch.equal(back.scale, quantized.scale)
    assert (back.planes, back.group_size) == (quantized.planes, quantized.group_size)
    torch.testing.assert_close(quantized.dequantize().double(), by_definition(quantized))
    with pytest.raises(WeightShapeError, match="holds 2 planes"):
        pack(quantized, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_the_sum_over_planes(case, bits, dtype):
    quantized, config = random_quantized(*case, "planes"), Config(activation_bits=bits)
    layer = TernaryLinear.from_quantized(quantized, config=config)
    x = torch.randn(2, 5, case[1]).to(dtype)
    y, w = layer(x), by_definition(quantized)
    assert y.dtype == dtype and layer(x[:0]).shape == (0, 5, case[0])
    torch.testing.assert_close(layer.weight.double(), w, rtol=1e-6, atol=1e-7)
    q = x.double()
    if bits:
        integers, sx = torch.ops.ternc.quantize_act(spread_input(x, *case[2:], bits), bits)
        first = integers.unflatten(-1, (-1, case[2], case[3]))[..., 0, :].flatten(-2)
        q = first[..., : case[1]].double() * sx.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    wanted = q @ w.T
    assert (y.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_columns_that_are_missing_leave_the_scale_of_a_row_alone():
    x = torch.randn(3, 10)
    for bits in (8, 4):
        spread = spread_input(x, 2, 4, bits)
        assert spread.shape == (3, 24)
        assert torch.equal(spread[:, :8], x[:, [0, 1, 2, 3, 0, 1, 2, 3]])
        wide, own = (torch.ops.ternc.quantize_act(v, bits)[1] for v in (spread, x))
        torch.testing.assert_close(wide, own, rtol=1e-6, atol=0)


def test_state_moves_and_folders(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(50, 12), torch.nn.Linear(12, 8))
    config = Config(planes=2, group_size=16, tie_scales=False)
    q = ternc.quantize(model, config)
    state, x = q.state_dict(), torch.randn(4, 50)
    assert state["0.trits"].shape == (2, 12, 10) and state["0.scale"].shape == (12, 4, 2)
    assert "free" in ternc.report(q).rows[0].format
    other = ternc.quantize(torch.nn.Sequential(torch.nn.Linear(50, 12), model[1]), config)
    other.load_state_dict(state)
    assert torch.equal(other(x), q(x))
    tied = ternc.quantize(model, Config(planes=1, group_size=16))
    tied.load_state_dict(state)  # another format comes with the state
    assert torch.equal(tied(x), q(x))
    ternc.save(q, tmp_path)
    assert torch.equal(ternc.load(tmp_path, model=model)(x), q(x))
    fast = torch.compile(q, backend="ternc", options={"inner": "aot_eager"})
    assert torch.equal(fast(x), q(x))


def test_scales_of_planes_are_trained():
    layer = TernaryLinear.from_quantized(random_quantized(6, 20, 2, 8, "planes"))
    layer.activation_bits = None
    layer.scale_requires_grad_()
    x, weight = torch.randn(9, 20), torch.randn(9, 6)
    (layer(x) * weight).sum().backward()
    scale = layer.scale.detach().unflatten(1, (3, 2)).requires_grad_()
    planes = planes_of(unpack(layer.packed).codes, 2).float()
    w = sum(expand_groups(scale[..., p], 8, 20) * planes[p] for p in range(2))
    (F.linear(x, w) * weight).sum().backward()
    torch.testing.assert_close(layer.scale.grad, scale.grad.flatten(1), rtol=1e-4, atol=1e-4)


def test_rows_of_an_embedding():
    quantized = random_quantized(11, 20, 3, 8, "planes")
    table = TernaryEmbedding.from_quantized(quantized)
    indices = torch.tensor([[0, 10], [3, 3]])
    torch.testing.assert_close(table(indices), quantized.dequantize()[indices])


def test_alternation_ends_where_no_step_helps():
    """Codes are the nearest, scales the least squares of them; an all-zero unit stays zero."""
    w = torch.randn(30, 64)
    w[4] = 0
    metric = torch.rand(64) + 0.1
    step = torch.ops.ternc.fit(w, 2, 0, 0)[1]
    scales = fit_scales(w, step, 2, 40, metric)
    codes = nearest(w, scales)
    levels = levels_of(scales)
    values = levels.gather(1, (codes + 4).long())
    best = (w[..., None] - levels[:, None]).abs().amin(2)
    torch.testing.assert_close((w - values).abs(), best)
    assert not values[4].any() and not codes[4].any()
    for row in (0, 17):
        basis = planes_of(codes[row : row + 1], 2)[:, 0].T * metric.sqrt()[:, None]
        wanted = torch.linalg.lstsq(basis, w[row] * metric.sqrt()).solution
        torch.testing.assert_close(scales[row], wanted, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_is_refused():
    wide = torch.zeros(1, 50_000)
    config = Config(planes=3, tie_scales=False)
    assert "150,144" in refuse(wide, config).reason and refuse(wide) is None
    plan = ternc.Config(planes=2, tie_scales=False)
    with pytest.raises(ConfigError, match="planes=1"):
        ternc.quantize(
            torch.nn.Linear(8, 8), plan, calibration=[torch.ones(2, 8)],
            reconstruction=ternc.calibration.reconstruct.Reconstruction(),
        )  # fmt: skip
