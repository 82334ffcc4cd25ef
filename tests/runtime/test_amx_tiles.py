"""The AMX kernels against the eager reference, bit for bit, on tiles emulated in plain C++.

Their decoding and walk run as they are; only the tile instructions are replaced, so that machines
without AMX test them too. Where there is AMX, test_cpu_kernels.py runs the real ones as well.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
from reference import linear_arguments, random_quantized

from ternc.config import CODE_MAX, INT8
from ternc.csrc import build
from ternc.formats import Packed, Quantized, pack
from ternc.runtime.ops import linear, quantize_act

HERE = Path(__file__).resolve().parents[1] / "tiles"
WEIGHTS = [
    # rows, columns, group_size
    (1, 1, 0),
    (130, 129, 0),
    (70, 1100, 0),
    (127, 261, 128),
    (65, 330, 12),
    (65, 330, 96),
    (129, 64, 16),
]
TOKENS = (4, 16, 17, 32, 33, 50, 71)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels of csrc/amx as a C library."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_vnni" not in flags or "avx512vbmi" not in flags:
        pytest.skip("decoding needs AVX-512 VNNI and VBMI")
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("tiles") / "tiles.so"
    sources = [str(HERE / "library.cpp"), str(build.FOLDER / "amx" / "kernels.cpp")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off"]
    include = ["-include", str(HERE / "emulated.h")]
    done = subprocess.run(
        [*compiler, *flags, *include, "-o", str(target), *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "amx" in done.stderr.lower():
        pytest.skip("the compiler knows no AMX")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def tile_linear(
    library: ctypes.CDLL,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    pieces: list[tuple[int, int]],
) -> torch.Tensor:
    """y [M, N] by ranges of tokens."""
    (tokens, columns), (rows, _) = x.shape, packed.shape
    q, sx = quantize_act.reference(x, 8)
    stride = -(-columns // 4) * 4
    q = torch.nn.functional.pad(q, (0, stride - columns)).contiguous()
    tiles = torch.full((-(-tokens // 16), -(-stride // 64), 1024 + 64), 99, dtype=torch.int8)
    sums = q.sum(1, dtype=torch.int32)
    offset = -tiles.data_ptr() % 64
    y = torch.full((tokens, rows), torch.nan)
    group = packed.group_size or columns
    for begin, end in pieces:
        palette = library.linear(
            packed.planes,
            address(q),
            address(sx),
            address(sums),
            ctypes.c_void_p(tiles.data_ptr() + offset),
            *map(ctypes.c_int64, (tokens, stride)),
            address(packed.weight),
            address(packed.scale),
            address(packed.multiplier),
            *map(ctypes.c_int64, (rows, columns, group, math.ceil(columns / group))),
            address(bias),
            address(y),
            *map(ctypes.c_int64, (begin, end)),
        )
        assert palette == 0, "the tiles of the thread were not released"
    return y


@pytest.mark.parametrize("planes", [1, 2, 3, INT8])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_bit_for_bit(library, weight, planes):
    rows, columns, group_size = weight
    group_size = 0 if planes == INT8 else group_size
    packed = pack(random_quantized(rows, columns, planes, group_size), "cpu")
    bias = torch.randn(rows)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns)
        expected = linear.reference(*linear_arguments(x, packed, bias, 8))
        assert torch.equal(tile_linear(library, x, packed, bias, [(0, tokens)]), expected)
        halves = [(0, 16), (16, tokens)]
        if tokens > 16:
            assert torch.equal(tile_linear(library, x, packed, bias, halves), expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [4096, 4100, 4113])
def test_large_outputs(library, rows, biased):
    """Streamed past the caches, also where rows begin and end within lines."""
    packed = pack(random_quantized(rows, 68, 1, 0), "cpu")
    x, bias = torch.randn(70, 68), torch.randn(rows) if biased else None
    expected = linear.reference(*linear_arguments(x, packed, bias, 8))
    assert expected.nbytes >= 1 << 20
    assert torch.equal(tile_linear(library, x, packed, bias, [(0, 32), (32, 70)]), expected)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group_size", [0, 128])
def test_the_largest_sums_fit(library, planes, group_size):
    columns, most = 131_072, CODE_MAX[planes]
    factor = 127 // most if group_size else 1
    multiplier = torch.full((2, columns // 128), factor, dtype=torch.uint8)
    weight = Quantized(
        torch.full((2, columns), -most, dtype=torch.int8),
        torch.ones(2),
        multiplier if group_size else None,
        group_size,
        planes,
    )
    x = torch.full((5, columns), -3.0)
    y = tile_linear(library, x, pack(weight, "cpu"), None, [(0, 5)])
    total = 127 * columns * most * factor
    assert (y == torch.tensor(float(total)) * (torch.tensor(3.0) / torch.tensor(127.0))).all()
