"""quantize_act, dequantize, embedding and training ops on the GPU against their references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packed_weights import assert_same, packed_on_gpu
from reference import CASES, dequantize_arguments
from torch import nn

import ternc
from ternc.errors import KernelError
from ternc.formats.quantized import expand_groups
from ternc.runtime import dispatch
from ternc.runtime.ops import dequantize, embedding, fit, quantize_act

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 3, 127, 4096, 20000])
def test_quantize_act(dtype, bits, columns):
    x = torch.randn(300, columns, device="cuda", dtype=dtype)
    x[::50, 0] = torch.nan
    x[1::50, 0] = torch.inf
    x[2::50] = 0
    x[3::50] = x[3::50] * 1e-30
    q, scale = torch.ops.ternc.quantize_act(x.view(3, 100, columns), bits)
    expected_q, expected_scale = quantize_act.reference(x.view(3, 100, columns), bits)
    assert torch.equal(q, expected_q)
    assert_same(scale, expected_scale)


def test_halves_round_to_even():
    x = torch.arange(-127, 127, device="cuda").float() + 0.5
    x = torch.cat([x, x.new_tensor([127.0])])
    q, scale = torch.ops.ternc.quantize_act(x, 8)
    assert scale.item() == 1.0
    assert torch.equal(q, x.round().to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [*CASES, (70, 1500, 1, 0, "row"), (33, 700, 3, 128, "row"), (70, 1500, 8), (9, 7, 8)],
    ids=str,
)
def test_dequantize_and_embedding(case, dtype):
    packed = packed_on_gpu(*case)
    arguments = dequantize_arguments(packed, dtype)
    w = torch.ops.ternc.dequantize(*arguments)
    assert dispatch.last_kernel(packed.weight) == "triton_dequantize"
    assert_same(w, dequantize.reference(*arguments))
    ids = torch.randint(0, case[0], (5, 300), device="cuda")
    for indices in (ids, ids.int().t(), ids[0, 0], ids[:0]):
        rows = torch.ops.ternc.embedding(indices, *arguments)
        assert dispatch.last_kernel(packed.weight) == "triton_embedding"
        assert_same(rows, embedding.reference(indices, *arguments))


def test_an_embedding_of_a_compiled_model_runs_the_kernel():
    """Its rows are those of the table, whatever else the graph does with them."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(500, 192), nn.Linear(192, 64)).cuda().bfloat16().eval()
    q = ternc.quantize(model, ternc.Config(planes=1, int8=("0",)))
    ids = torch.randint(0, 500, (2, 9), device="cuda")
    with torch.no_grad():
        expected = q(ids)
        assert torch.equal(q[0](ids), F.embedding(ids, q[0].weight))
        assert torch.equal(torch.compile(q, mode="reduce-overhead")(ids), expected)
    assert dispatch.last_kernel(q[0].packed_weight) == "triton_embedding"


OUT_OF_RANGE = """
import torch
from packed_weights import packed_on_gpu
from reference import dequantize_arguments
from ternc.runtime import ops
ops.register()
arguments = dequantize_arguments(packed_on_gpu(9, 100, 8))
torch.ops.ternc.embedding(torch.tensor([0, 9], device="cuda"), *arguments)
torch.cuda.synchronize()
"""


def test_an_index_out_of_range_is_an_assertion():
    """In a process of its own: it leaves the device unusable there."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "an index is out of range" in done.stdout + done.stderr


FITS = [(planes, group_size) for planes in (1, 2, 3) for group_size in (128, 100, 0, -1)]
TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("planes", "group_size", "dtype", "columns"),
    [(*fit, TYPES[i % 2], 1000) for i, fit in enumerate(FITS)]
    + [(1, 128, torch.bfloat16, 1000)]
    + [(1, 128, torch.bfloat16, 28672), (3, 100, torch.float32, 20000)]
    + [(1, 0, torch.bfloat16, 28672), (2, 0, torch.float32, 20000)],
    ids=str,
)
def test_fit_and_fake_quantize(planes, group_size, dtype, columns):
    """As good a fit as the reference's; near ties, sums in another order choose other codes.

    Rows that a program holds, in pieces, and by sums of all.
    """
    w = torch.randn(64, columns, device="cuda").to(dtype)
    codes, scale, multiplier = torch.ops.ternc.fit(w, planes, group_size, 0)
    expected = fit.reference(w, planes, group_size, 0)
    values = torch.ops.ternc.fake_quantize(w, planes, group_size)

    def dequantized(codes, scale, multiplier):
        m = expand_groups(multiplier, group_size, columns) if group_size > 0 else 1.0
        return (scale[:, None] if len(scale) > 1 else scale) * (m * codes)

    assert_same(values, dequantized(codes, scale, multiplier).to(dtype))
    error = (dequantized(codes, scale, multiplier) - w).norm()
    torch.testing.assert_close(error, (dequantized(*expected) - w).norm(), rtol=1e-3, atol=0)
    w.requires_grad_()
    torch.ops.ternc.fake_quantize(w, planes, group_size).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_fit_refuses_what_is_not_finite():
    w = torch.randn(8, 256, device="cuda")
    w[3, 5] = torch.nan
    with pytest.raises(KernelError, match="NaN"):
        torch.ops.ternc.fit(w, 1, 128, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [3, 4096, 20000])
def test_fake_quantize_act(dtype, bits, columns):
    x = torch.randn(30, columns, device="cuda").to(dtype)
    x[1, 0], x[2] = torch.nan, 0
    q, scale = quantize_act.reference(x, bits)
    assert_same(torch.ops.ternc.fake_quantize_act(x, bits), (q * scale).to(dtype))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("group_size", [128, 0, -1])
def test_training_ops_do_not_wait_for_the_host(planes, group_size):
    w = torch.randn(256, 512, device="cuda", requires_grad=True)
    x = torch.randn(30, 512, device="cuda", requires_grad=True)

    def step():
        values = torch.ops.ternc.fake_quantize(w, planes, group_size)
        (torch.ops.ternc.fake_quantize_act(x, 8) @ values.T).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
