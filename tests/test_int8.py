"""Heads and embeddings as int8: packed on request, tied weights once, saved, compiled, reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ternc
from ternc.config import INT8, Config
from ternc.errors import CheckpointError
from ternc.formats.int8 import fit_int8
from ternc.formats.packed import pack
from ternc.modules.embedding import TernaryEmbedding
from ternc.modules.linear import TernaryLinear
from ternc.runtime import ops

HEADS = Config(planes=2, int8=("embed", "lm_head"))


class Model(nn.Module):
    def __init__(self, tied=True, vocabulary=70, width=36):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.fc = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(F.relu(self.fc(self.embed(ids))))


@pytest.fixture
def ids():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return torch.randint(0, 70, (2, 5))


def rows_of(report):
    return {row.name: row for row in report.rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fit_is_absmax_a_row(dtype):
    ops.register()
    w = torch.randn(9, 33).to(dtype)
    w[4] = 0
    w[5] = torch.finfo(torch.float32).tiny
    quantized = fit_int8(w)
    values = w.float()
    scale = values.abs().amax(1) / 127
    assert torch.equal(quantized.scale, scale)
    codes = (values / torch.where(scale > 0, scale, torch.inf)[:, None]).round()
    assert torch.equal(quantized.codes, codes.to(torch.int8))
    error = (quantized.dequantize() - values).abs() / scale.clamp(min=1e-30)[:, None]
    assert error.max() <= 0.501 and quantized.describe() == "int8 row"


@pytest.mark.parametrize("tied", [True, False])
def test_quantize_packs_head_and_embedding(ids, tied):
    model = Model(tied)
    q = ternc.quantize(model, HEADS)
    assert type(q.embed) is TernaryEmbedding and type(q.lm_head) is TernaryLinear
    assert q.embed.planes == q.lm_head.planes == INT8 and q.fc.planes == 2
    assert (q.embed.packed_weight is q.lm_head.packed_weight) == tied
    with torch.no_grad():
        table = q.embed.weight
        assert torch.equal(q.embed(ids), F.embedding(ids, table))
        assert (q.embed(ids) - model.embed(ids)).abs().max() <= model.embed.weight.abs().max() / 250
        x = torch.randn(3, 36)
        exact = F.linear(x, q.lm_head.weight)
        assert (q.lm_head(x) - exact).norm() < 0.02 * exact.norm()
    report = ternc.report(q)
    rows = rows_of(report)
    assert rows["embed"].format == "int8 row" and rows["lm_head"].format == "int8 row a8"
    assert rows["lm_head"].pattern == "linear" and rows["embed"].pattern == "embedding"
    assert (rows["lm_head"].shared_with == "embed") == tied
    held = {b.untyped_storage()._cdata: b.nbytes for b in (*q.buffers(), *q.parameters())}
    assert report.totals.bytes_after == sum(held.values())
    assert report.totals.weights == (1 if tied else 2) * 70 * 36 + 36 * 36 + 36


def test_one_name_marks_a_tied_weight(ids):
    q = ternc.quantize(Model(), Config(planes=2, int8=("lm_head",)))
    assert q.embed.packed_weight is q.lm_head.packed_weight
    untied = ternc.quantize(Model(tied=False), Config(planes=2, int8=("lm_head",)))
    assert type(untied.embed) is nn.Embedding and untied.lm_head.planes == INT8


def test_nothing_is_packed_unasked():
    q = ternc.quantize(Model(), Config(planes=2))
    assert type(q.embed) is nn.Embedding and type(q.lm_head) is nn.Linear
    assert q.embed.weight is q.lm_head.weight


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_planes_for_an_embedding_on_request(ids, rotation):
    model = Model(tied=False)
    q = ternc.quantize(model, Config(planes=3, include=("embed",), rotation=rotation))
    assert type(q.embed) is TernaryEmbedding and q.embed.planes == 3
    assert torch.equal(q.embed(ids), F.embedding(ids, q.embed.weight))


def test_what_cannot_be_int8_says_why():
    model = Model(tied=False)
    model.embed.max_norm = 1.0
    model.conv = nn.Conv1d(4, 4, 1)
    model.table = nn.Module()
    model.table.weight = nn.Parameter(torch.randn(4, 4))
    config = Config(int8=("embed", "table"))
    rows = rows_of(ternc.report(ternc.quantize(model, config)))
    assert "max_norm" in rows["embed"].reason and rows["embed"].action == "skipped"
    assert "no linear and no embedding" in rows["table"].reason


@pytest.mark.parametrize("skeleton", [None, "meta"])
def test_saved_and_loaded(ids, tmp_path, skeleton):
    q = ternc.quantize(Model(), HEADS)
    ternc.save(q, tmp_path)
    with torch.device(skeleton or "cpu"):
        model = Model()
    loaded = ternc.load(tmp_path, model)
    assert loaded.embed.packed_weight is loaded.lm_head.packed_weight
    with torch.no_grad():
        assert torch.equal(loaded(ids), q(ids))
    stored = q.state_dict()
    assert stored["embed.codes"].dtype == torch.int8 and "embed.trits" not in stored
    assert torch.equal(stored["lm_head.codes"], stored["embed.codes"])
    fresh = ternc.quantize(Model(), HEADS)
    fresh.load_state_dict(stored)
    assert torch.equal(fresh.embed.weight, q.embed.weight)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(70, 35, dtype=torch.int8), r"int8 \[70, 36\] is wanted"),
        (torch.zeros(70, 36), "int8"),
        (torch.full((70, 36), -128, dtype=torch.int8), "-128"),
    ],
)
def test_damaged_codes_are_refused(codes, message):
    q = ternc.quantize(Model(tied=False), HEADS)
    state = {**q.state_dict(), "lm_head.codes": codes}
    with pytest.raises((CheckpointError, RuntimeError), match=message):
        q.load_state_dict(state)


def test_a_float_weight_loads_into_an_int8_layer():
    q = ternc.quantize(Model(tied=False), HEADS)
    other = Model(tied=False)
    q.load_state_dict(other.state_dict())
    expected = pack(fit_int8(other.lm_head.weight.detach()), "cpu")
    assert torch.equal(q.lm_head.packed_weight, expected.weight)


@pytest.mark.parametrize(
    ("inner", "names"),
    [("aot_eager", HEADS.int8), ("eager", ("embed",)), ("eager", ("lm_head",))],
)
def test_backend_packs_float_head_and_embedding(ids, inner, names):
    """Of a tied weight one name is enough, the other one's default exclusion does not matter."""
    model = Model().eval()
    options = {"planes": 2, "int8": names, "inner": inner}
    fast = torch.compile(model, backend="ternc", options=options)
    with torch.no_grad():
        expected = ternc.quantize(model, Config(planes=2, int8=HEADS.int8, method="rtn"))(ids)
        assert torch.equal(fast(ids), expected)
        report = ternc.report(fast)
        rows = rows_of(report)
        assert rows["embed"].format == "int8 row" and rows["lm_head"].format == "int8 row a8"
        assert rows["lm_head"].shared_with == "embed"
        model.embed.weight.mul_(-1.0)
        changed = ternc.quantize(model, Config(planes=2, int8=HEADS.int8, method="rtn"))(ids)
        assert torch.equal(fast(ids), changed)
        model.embed.weight[3, 3] = torch.nan
        with pytest.warns(RuntimeWarning, match="op by op"):
            assert fast(ids).isnan().any()


@pytest.mark.parametrize("name", HEADS.int8)
def test_a_name_of_an_untied_weight_is_that_of_one(ids, name):
    with torch.no_grad():
        report = ternc.explain(Model(tied=False).eval(), ids, config=Config(int8=(name,)))
    assert [row.name for row in report.rows if row.format.startswith("int8")] == [name]


def test_compiled_after_quantize(ids):
    q = ternc.quantize(Model().eval(), HEADS)
    fast = torch.compile(q, backend="ternc", options={"inner": "eager"})
    with torch.no_grad():
        assert torch.equal(fast(ids), q(ids))
    report = ternc.report(fast)
    assert set(rows_of(report)) == {"embed", "fc", "lm_head"}
    assert report.totals.to_dict() == ternc.report(q).totals.to_dict()


def test_in_training_they_stay_float(ids):
    model = Model()
    options = {"planes": 2, "int8": ("embed", "lm_head"), "inner": "eager"}
    fast = torch.compile(model, backend="ternc", options=options)
    fast(ids).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0
    assert "training" in rows_of(ternc.report(fast))["lm_head"].reason


def test_prepare_leaves_them_to_quantize(ids):
    prepared = ternc.train.prepare(Model(), ternc.train.TrainConfig(weights=HEADS))
    assert type(prepared.embed) is nn.Embedding and type(prepared.lm_head) is nn.Linear
    assert ternc.quantize(prepared, HEADS).lm_head.planes == INT8


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("planes", [1, 3, INT8])
def test_embedding_op_agrees_with_its_reference(planes, ids_dtype):
    from reference import random_quantized

    from ternc.runtime.ops import embedding

    ops.register()
    group = 0 if planes == INT8 else 32
    packed = pack(random_quantized(130, 100, planes, group), "cpu")
    tensors = (packed.weight, packed.scale, packed.multiplier, 130, 100, group, packed.layout)
    for shape in ((), (0,), (7,), (2, 3, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wanted = torch.randint(0, 130, shape).to(ids_dtype)
            seen = torch.ops.ternc.embedding(wanted, *tensors, dtype)
            assert torch.equal(seen, embedding.reference(wanted, *tensors, dtype))
            assert seen.shape == (*shape, 100) and seen.dtype == dtype
    strided = torch.randint(0, 130, (4, 6)).t().to(ids_dtype)
    seen = torch.ops.ternc.embedding(strided, *tensors, torch.float32)
    assert torch.equal(seen, embedding.reference(strided, *tensors, torch.float32))
    for wrong in (130, -1):
        for op in (torch.ops.ternc.embedding, embedding.reference):
            with pytest.raises((RuntimeError, IndexError), match=r"range|bounds"):
                op(torch.tensor([0, wrong]).to(ids_dtype), *tensors, torch.float32)
    arguments = (torch.tensor([1, 2]), *tensors, torch.float32)
    torch.library.opcheck(torch.ops.ternc.embedding.default, arguments)
