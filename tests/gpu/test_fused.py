"""norm_quantize, activate_quantize, hadamard and linears on the GPU against their references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_weights import assert_same, packed_on_gpu

from ternc.runtime import dispatch
from ternc.runtime.ops import (
    activate_quantize,
    hadamard,
    linears,
    linears1,
    norm_quantize,
    quantize_act,
)

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROTATIONS = [(1, 0), (127, 0), (4096, 0), (14336, 0), (20000, 0), (6, 2), (48, 16), (1536, 512)]
ROTATIONS += [(4096, 4096), (6912, 256), (14336, 2048), (28672, 4096), (33024, 256)]
"""(width, block of the Hadamard transform); block 0: none."""
ANY_ROTATION = pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
TOKENS = (1, 3, 300)


def random_signs(width):
    return torch.randint(0, 2, (width,), dtype=torch.int8, device="cuda") * 2 - 1


class Differences:
    """q differs by 1 at most, in at most 0.1 % of all elements compared."""

    def __init__(self):
        self.count = self.total = 0

    def compare(self, seen, expected):
        difference = (seen[0].int() - expected[0].int()).abs()
        assert difference.max() <= 1
        self.count += int(difference.sum())
        self.total += difference.numel()
        torch.testing.assert_close(seen[1], expected[1], rtol=8e-3, atol=1e-7, equal_nan=True)

    def check(self):
        assert self.count <= max(1, 1e-3 * self.total), f"{self.count} of {self.total}"


@ANY_ROTATION
@DTYPES
def test_norm_quantize(rotation, dtype):
    """Every norm at every width; in bf16 of few and of many rows, which other kernels take."""
    width, block = rotation
    differences = Differences()
    gain = torch.randn(width, device="cuda")
    bias = torch.randn(width, device="cuda").to(dtype)
    signs = random_signs(width) if block else None
    kinds = (
        ("rms", (gain.to(dtype), None), 0.0, True, 8),
        ("layer", (gain, bias), 1.0, False, 4),
        ("layer", (None, None), 0.0, False, 8),
    )
    for tokens in TOKENS:
        x = (torch.randn(tokens, width, device="cuda") * 3 + 1).to(dtype)
        x[2:3, 0] = torch.nan
        some = kinds if dtype == torch.bfloat16 else kinds[:1] if tokens > 3 else kinds[1:]
        some = kinds[:1] if width == 28672 else some  # long to compile
        for kind, given, offset, round_first, bits in some:
            rest = (kind, 1e-5, offset, round_first, signs, block, bits, True)
            y, *seen = torch.ops.ternc.norm_quantize(x, *given, *rest)
            y_expected, *expected = norm_quantize.reference(x, *given, *rest)
            tolerance = max(2 * torch.finfo(dtype).eps, 2e-5)
            torch.testing.assert_close(
                y, y_expected, rtol=tolerance, atol=tolerance, equal_nan=True
            )
            differences.compare(seen, expected)
            if kind == "rms":
                empty, *same = torch.ops.ternc.norm_quantize(x, *given, *rest[:-1], False)
                assert empty.shape == (0,)
                assert torch.equal(same[0], seen[0])
                assert_same(same[1], seen[1])
    differences.check()


@ANY_ROTATION
@DTYPES
def test_activate_quantize(rotation, dtype):
    width, block = rotation
    width = max(width, 5)  # one value alone may be a difference of nearly equal numbers
    differences = Differences()
    names = list(activate_quantize.ACTIVATIONS)
    for turn, tokens in enumerate(TOKENS):
        both = (torch.randn(tokens, 2 * width, device="cuda") * 2).to(dtype)
        gate, up = both.chunk(2, -1)
        signs = random_signs(width) if block else None
        # Rows of one width meet every function, others two each, or one.
        some = names if width == 127 else (names[turn], names[turn + 3])
        for name in some if width == 127 or dtype == torch.bfloat16 else some[:1]:
            arguments = (gate, up if turn else None, name, signs, block, 4 if turn == 2 else 8)
            seen = torch.ops.ternc.activate_quantize(*arguments)
            differences.compare(seen, activate_quantize.reference(*arguments))
    differences.check()


@pytest.mark.parametrize(
    "rotation", [(2560, 512), (4096, 4096), (6912, 256), (14336, 2048)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_programs_that_walk_over_rows(rotation, dtype):
    width, block = rotation
    tokens = 1301  # more than programs, so that each takes several rows
    differences = Differences()
    gate, up = torch.randn(tokens, 2 * width, device="cuda").to(dtype).chunk(2, -1)
    signs = random_signs(width)
    for arguments in ((gate, None, "none"), (gate, up, "silu")):
        seen = torch.ops.ternc.activate_quantize(*arguments, signs, block, 8)
        differences.compare(seen, activate_quantize.reference(*arguments, signs, block, 8))
    rest = (torch.randn(width, device="cuda"), None, "rms", 1e-5, 0.0, True, signs, block, 8, True)
    seen = torch.ops.ternc.norm_quantize(gate, *rest)
    differences.compare(seen[1:], norm_quantize.reference(gate, *rest)[1:])
    differences.check()
    z, expected = (
        torch.ops.ternc.hadamard(gate, signs, block),
        hadamard.reference(gate, signs, block),
    )
    torch.testing.assert_close(z, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_every_quotient_of_a_rotated_row_rounds_as_the_reference():
    """Rows whose transform is exact: every bf16 largest value beside every smaller one."""
    most = torch.arange(128.0, 256.0, device="cuda")[:, None]
    smaller = torch.cat([torch.arange(128.0, 256.0, device="cuda") / 2**k for k in range(8)])
    values = torch.cat([most, smaller.expand(128, -1).minimum(most)], 1).repeat(2, 1)
    # H_4 / 2 gives back every value, and three zeros.
    x = F.pad(values, (0, 7)).repeat_interleave(4, 1).bfloat16() / 2
    for tokens in (1, 256):
        seen = torch.ops.ternc.activate_quantize(x[-tokens:], None, "none", None, 4, 8)
        expected = activate_quantize.reference(x[-tokens:], None, "none", None, 4, 8)
        assert torch.equal(seen[0], expected[0])
        assert torch.equal(seen[1], expected[1])


@pytest.mark.parametrize("rotation", [(2560, 512), (4096, 4096), (6912, 256)], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_few_rotated_rows(rotation, tokens):
    """Every call of few rows for itself, not only all rows together."""
    width, block = rotation
    signs, gain = random_signs(width), torch.randn(width, device="cuda", dtype=torch.bfloat16)
    norm = (gain, None, "rms", 1e-5, 0.0, True, signs, block, 8, False)
    for _ in range(20 if tokens < 1024 else 2):
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        seen = torch.ops.ternc.activate_quantize(x, None, "none", signs, block, 8)
        expected = activate_quantize.reference(x, None, "none", signs, block, 8)
        for found, known in (
            (seen, expected),
            (torch.ops.ternc.norm_quantize(x, *norm)[1:], norm_quantize.reference(x, *norm)[1:]),
        ):
            differences = Differences()
            differences.compare(found, known)
            differences.check()


@ANY_ROTATION
@DTYPES
def test_hadamard(rotation, dtype):
    """A row that is not finite leaves the others as they are, also those of its tile."""
    width, block = rotation
    tolerance = max(2 * torch.finfo(dtype).eps, 5e-5)
    for tokens in TOKENS:
        x = torch.randn(tokens, width, device="cuda").to(dtype)
        x[2:3, width // 2] = torch.nan
        signs = random_signs(width) if tokens > 1 else None
        z = torch.ops.ternc.hadamard(x, signs, block or 1)
        expected = hadamard.reference(x, signs, block or 1)
        assert z[2:3].isnan().any(1).all()
        z[2:3] = expected[2:3] = 0
        torch.testing.assert_close(z, expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_hadamard():
    x = torch.randn(5, 768, device="cuda", requires_grad=True)
    signs, grad = random_signs(768), torch.randn(5, 768, device="cuda")
    torch.ops.ternc.hadamard(x, signs, 256).backward(grad)
    expected = hadamard.reference(grad, None, 256) * signs
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_finite():
    x = torch.randn(6, 192, device="cuda")
    for block in (0, 64):
        arguments = (None, None, "rms", 1e-5, 0.0, False, None, block, 8, False)
        before = torch.ops.ternc.norm_quantize(x, *arguments)[1:]
        bad = x.clone()
        bad[1, 100], bad[3, 0], bad[4] = torch.nan, torch.inf, 0.0
        _, q, sx = torch.ops.ternc.norm_quantize(bad, *arguments)
        assert sx[[1, 3]].isnan().all()
        assert not q[[1, 3, 4]].any()
        assert not sx[4].any()
        assert torch.equal(q[[0, 2, 5]], before[0][[0, 2, 5]])
        assert torch.equal(sx[[0, 2, 5]], before[1][[0, 2, 5]])


ALIKE = [(129, 1, 128), (64, 1, 128), (65, 1, 128)]
MIXED = [(129, 1, 128), (3, 2, 0), (65, 1, 128), (33, 3, 32)]
FREE = [(9, 1, 16, "free"), (20, 1, 16)]


def linears_arguments(weights, columns, bits, dtype):
    packed = [packed_on_gpu(rows, columns, *rest) for rows, *rest in weights]
    none = torch.empty(0, device="cuda", dtype=torch.uint8)
    return (
        [p.weight for p in packed],
        [p.scale for p in packed],
        [none if p.multiplier is None else p.multiplier for p in packed],
        [torch.randn(p.shape[0], device="cuda") for p in packed],
        [p.shape[0] for p in packed],
        [p.group_size for p in packed],
        bits,
        [p.layout for p in packed],
        dtype,
    )


def run_linears(x, sx, *rest):
    return getattr(torch.ops.ternc, f"linears{len(rest[0])}")(x, sx, *rest)


@pytest.mark.parametrize(
    ("weights", "columns", "dtype"),
    [
        *[(ALIKE, columns, torch.bfloat16) for columns in (3, 130, 1040, 4096)],
        (ALIKE, 130, torch.float32),
        (ALIKE, 1040, torch.float16),
        (MIXED, 130, torch.bfloat16),
        (MIXED, 4096, torch.float32),
        (FREE, 3, torch.bfloat16),
        (FREE, 1040, torch.float16),
    ],
    ids=str,
)
def test_linears(weights, columns, dtype):
    for bits in (8, 4):
        rest = linears_arguments(weights, columns, bits, dtype)
        for tokens in (1, 2, 17, 70, 300):
            x = torch.randn(tokens, columns, device="cuda").to(dtype)
            expected = linears.reference(x, None, *rest)
            for given in ((x, None), quantize_act.reference(x, bits)):
                for y, y_expected in zip(run_linears(*given, *rest), expected, strict=True):
                    if weights is FREE:
                        tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
                        torch.testing.assert_close(y, y_expected, rtol=tolerance, atol=tolerance)
                    else:
                        assert_same(y, y_expected)


@DTYPES
@pytest.mark.parametrize("bits", [8, 0])
def test_linears_with_a_residual(dtype, bits):
    packed = packed_on_gpu(129, 260, 1, 128)
    numbers = (129, 128, bits, packed.layout, dtype)
    for tokens in (1, 5, 200):
        x = torch.randn(tokens, 260, device="cuda").to(dtype)
        residual = torch.randn(tokens, 129, device="cuda").to(dtype)
        bias = torch.randn(129, device="cuda") if tokens > 1 else None
        rest = (packed.weight, packed.scale, packed.multiplier, bias, residual, *numbers)
        expected = linears1.reference(x, None, *rest)
        y = torch.ops.ternc.linears1(x, None, *rest)
        if bits:
            assert_same(y, expected)
            q, sx = quantize_act.reference(x, bits)
            assert_same(torch.ops.ternc.linears1(q, sx, *rest), expected)
        else:
            tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * 16)


def test_linears_record_every_weight():
    for tokens, kernel in ((1, "triton_gemv"), (9, "triton_gemm")):
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
        rest = linears_arguments(MIXED, 512, 8, x.dtype)
        run_linears(x, None, *rest)
        assert {dispatch.last_kernel(weight) for weight in rest[0]} == {kernel}
