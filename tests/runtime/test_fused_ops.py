"""norm_quantize, activate_quantize, hadamard: every instruction set against the references."""

from __future__ import annotations

import pytest
import torch
from reference import spread_out

from ternc.runtime.ops import activate_quantize, hadamard, norm_quantize

pytestmark = pytest.mark.usefixtures("every_isa")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOKENS = (0, 1, 2, 5, 33)
ROTATIONS = [(1, 0), (3, 0), (127, 0), (129, 0), (129, 1), (6, 2), (132, 4), (24, 8), (48, 16)]
ROTATIONS += [(96, 32), (192, 64), (384, 128), (768, 256), (1536, 512), (1024, 1024), (2048, 2048)]
ROTATIONS += [(4096, 4096)]
"""(width, block of the Hadamard transform); block 0: none."""
SOME_ROTATIONS = [(1, 0), (129, 0), (132, 4), (768, 256)]
ANY_ROTATION = pytest.mark.parametrize("rotation", ROTATIONS, ids=str)


def random_signs(width):
    return torch.randint(0, 2, (width,), dtype=torch.int8) * 2 - 1


def assert_same(seen, expected):
    """Bit for bit, NaN where NaN is expected."""
    assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
    assert torch.equal(seen.isnan(), expected.isnan())
    assert torch.equal(seen.nan_to_num(), expected.nan_to_num())


def assert_close(seen, expected):
    """Within two roundings of the dtype and of fp32 sums."""
    assert (seen.dtype, seen.shape) == (expected.dtype, expected.shape)
    tolerance = max(2 * torch.finfo(seen.dtype).eps, 4e-6)
    torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


class Differences:
    """q differs by 1 at most, in at most 0.1 % of all elements compared."""

    def __init__(self):
        self.count = self.total = 0

    def compare(self, seen, expected):
        q, sx = seen
        q_expected, sx_expected = expected
        assert (q.dtype, q.shape) == (q_expected.dtype, q_expected.shape)
        difference = (q.int() - q_expected.int()).abs()
        assert difference.numel() == 0 or difference.max() <= 1
        self.count += int(difference.sum())
        self.total += difference.numel()
        assert sx.dtype == torch.float32
        torch.testing.assert_close(sx, sx_expected, rtol=8e-3, atol=1e-7, equal_nan=True)

    def check(self):
        # A few elements are too few to have a share of 0.1 %.
        assert self.count <= max(1, 1e-3 * self.total), f"{self.count} of {self.total}"


# Hadamard


@ANY_ROTATION
@DTYPES
def test_hadamard_is_bit_for_bit(rotation, dtype):
    width, block = rotation
    for tokens in TOKENS:
        x = torch.randn(tokens, width).to(dtype)
        signs = random_signs(width) if tokens % 2 else None
        seen = torch.ops.ternc.hadamard(x, signs, block or 1)
        assert_same(seen, hadamard.reference(x, signs, block or 1))


def test_hadamard_of_strided_tokens():
    x = torch.randn(3, 64, 5)
    for view in (x.transpose(1, 2), torch.randn(4, 100)[:, 3:67], torch.randn(64, 2)[:, 0]):
        assert_same(torch.ops.ternc.hadamard(view, None, 64), hadamard.reference(view, None, 64))


def test_hadamard_undoes_itself():
    x = torch.randn(7, 256, dtype=torch.float32)
    twice = torch.ops.ternc.hadamard(torch.ops.ternc.hadamard(x, None, 256), None, 256)
    torch.testing.assert_close(twice, x, rtol=1e-5, atol=1e-5)


# Norm


@ANY_ROTATION
@DTYPES
@pytest.mark.parametrize("kind", norm_quantize.KINDS)
def test_norm_quantize(rotation, dtype, kind):
    width, block = rotation
    differences = Differences()
    for tokens in TOKENS:
        x = (torch.randn(tokens, width) * 3 + 1).to(dtype)
        gain = torch.randn(width).to([dtype, torch.float32][tokens % 2]) if tokens != 2 else None
        bias = torch.randn(width).to(dtype) if tokens != 5 else None
        signs = random_signs(width) if block and tokens % 2 else None
        for round_first, offset, bits in ((False, 0.0, 8), (True, 1.0, 4), (True, 0.0, 8)):
            rest = (kind, 1e-5, offset, round_first, signs, block, bits, True)
            y, *seen = torch.ops.ternc.norm_quantize(x, gain, bias, *rest)
            y_expected, *expected = norm_quantize.reference(x, gain, bias, *rest)
            assert_close(y, y_expected)
            differences.compare(seen, expected)
    differences.check()


@DTYPES
def test_norm_quantize_without_y(dtype):
    x = torch.randn(5, 129).to(dtype)
    arguments = (x, torch.randn(129), None, "rms", 1e-6, 0.0, False, None, 0, 8)
    kept, *expected = torch.ops.ternc.norm_quantize(*arguments, True)
    y, *seen = torch.ops.ternc.norm_quantize(*arguments, False)
    assert y.shape == (0,)
    assert y.dtype == kept.dtype == dtype
    assert all(map(torch.equal, seen, expected))


@DTYPES
@pytest.mark.parametrize("kind", norm_quantize.KINDS)
def test_the_kept_y_is_what_was_quantised(dtype, kind):
    x = torch.randn(3, 256).to(dtype)
    rest = (kind, 1e-5, 0.0, True, random_signs(256), 64, 8, True)
    y, q, sx = torch.ops.ternc.norm_quantize(x, torch.randn(256).to(dtype), None, *rest)
    rotated = torch.ops.ternc.hadamard(y, rest[4], 64)
    assert_same(q, torch.ops.ternc.quantize_act(rotated, 8)[0])
    assert_same(sx, torch.ops.ternc.quantize_act(rotated, 8)[1])


def test_norm_of_a_large_mean():
    x = torch.randn(2, 4096) + 1000.0
    y = torch.ops.ternc.norm_quantize(x, None, None, "layer", 1e-5, 0.0, False, None, 0, 8, True)[0]
    exact = torch.nn.functional.layer_norm(x.double(), (4096,), eps=1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [128, 130])
def test_norm_with_operands_that_are_not_dense(width):
    (x, gain, bias), signs = torch.randn(3, 5, width), random_signs(width)
    rest = ("layer", 1e-5, 0.0, False)
    block = 2
    expected = torch.ops.ternc.norm_quantize(x, gain[0], bias[0], *rest, signs, block, 8, True)
    spread = (spread_out(t) for t in (x, gain[0], bias[0]))
    seen = torch.ops.ternc.norm_quantize(*spread, *rest, spread_out(signs), block, 8, True)
    assert all(map(torch.equal, seen, expected))


@pytest.mark.parametrize("kind", norm_quantize.KINDS)
@pytest.mark.parametrize("width, block", [(192, 0), (192, 64), (4096, 4096)])
def test_norm_rows_that_are_not_finite(kind, width, block):
    x, gain = torch.randn(6, width), torch.rand(width) if block > 64 else None
    arguments = (
        gain,
        gain if kind == "layer" else None,
        kind,
        1e-5,
        0.0,
        False,
        None,
        block,
        8,
        False,
    )
    _, q_before, sx_before = torch.ops.ternc.norm_quantize(x, *arguments)
    x[1, 100], x[3, 0], x[4] = torch.nan, torch.inf, 0.0
    _, q, sx = torch.ops.ternc.norm_quantize(x, *arguments)
    assert sx[[1, 3]].isnan().all()
    assert (q[[1, 3]] == 0).all()
    if arguments[1] is None:
        assert (q[4] == 0).all()
        assert (sx[4] == 0).all()
    assert torch.equal(q[[0, 2, 5]], q_before[[0, 2, 5]])
    assert torch.equal(sx[[0, 2, 5]], sx_before[[0, 2, 5]])


@pytest.mark.parametrize("kind", norm_quantize.KINDS)
@pytest.mark.parametrize(
    ("width", "block", "gain"),
    [(129, 0, 1.0), (192, 64, 1.0), (192, 64, 3e-38), (2048, 64, 1.0)],
)
def test_norm_of_very_large_and_very_small_rows(kind, width, block, gain):
    sizes = torch.tensor([1.0, 1e18, 1e25, 1e30, 1e36, 1e37, 1e-18, 1e-25])
    x = (torch.randn(8, width) + 0.5) * sizes[:, None]
    bias = torch.randn(width) * gain if kind == "layer" else None
    rest = (torch.randn(width) * gain, bias, kind, 0.0, 0.0, False, None, block, 8, False)
    differences = Differences()
    seen, expected = (
        f(x, *rest)[1:] for f in (torch.ops.ternc.norm_quantize, norm_quantize.reference)
    )
    differences.compare(seen, expected)
    differences.check()
    torch.testing.assert_close(seen[1], expected[1], rtol=1e-5, atol=0.0)


# Activation


@pytest.mark.parametrize("rotation", SOME_ROTATIONS, ids=str)
@DTYPES
@pytest.mark.parametrize("activation", activate_quantize.ACTIVATIONS)
def test_activate_quantize(rotation, dtype, activation):
    width, block = rotation
    differences = Differences()
    for tokens in TOKENS:
        gate = (torch.randn(tokens, width) * 2).to(dtype)
        up = torch.randn(tokens, width).to(dtype) if tokens != 5 else None
        signs = random_signs(width) if block and tokens % 2 else None
        for bits in (8, 4):
            arguments = (gate, up, activation, signs, block, bits)
            seen = torch.ops.ternc.activate_quantize(*arguments)
            differences.compare(seen, activate_quantize.reference(*arguments))
    differences.check()


@pytest.mark.parametrize("activation", activate_quantize.ACTIVATIONS)
def test_activation_functions(activation):
    """The scale sx of a row of one value says what the function gave."""
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e30, -200.0, 1e-20, 88.9, 1e4])])
    _, sx = torch.ops.ternc.activate_quantize(x[:, None], None, activation, None, 0, 8)
    exact = activate_quantize.ACTIVATIONS[activation](x.double()).abs()
    value = sx[:, 0].double() * 127
    finite = exact < 1e30
    tolerance = 2e-7 * exact + (1.2e-7 * x.abs() if "gelu" in activation else 0)
    if activation == "silu":
        tolerance = 4e-7 * exact + 1e-35
    assert ((value - exact).abs() <= tolerance + 1e-36)[finite].all()


@pytest.mark.parametrize("activation", activate_quantize.ACTIVATIONS)
def test_activation_rows_that_are_not_finite(activation):
    gate, up = torch.randn(6, 130), torch.randn(6, 130)
    before = torch.ops.ternc.activate_quantize(gate, up, activation, None, 0, 8)
    gate[1, 100], up[2, 3], gate[3, 129] = torch.nan, torch.nan, torch.inf
    gate[4], up[4] = 0.0, 0.0
    q, sx = torch.ops.ternc.activate_quantize(gate, up, activation, None, 0, 8)
    assert sx[[1, 2, 3]].isnan().all()
    assert (q[[1, 2, 3, 4]] == 0).all()
    assert (sx[4] == 0).all()
    assert torch.equal(q[[0, 5]], before[0][[0, 5]])
    assert torch.equal(sx[[0, 5]], before[1][[0, 5]])


def test_gate_and_up_in_one_tensor():
    both = torch.randn(2, 3, 128)
    gate, up = both.chunk(2, -1)
    seen = torch.ops.ternc.activate_quantize(gate, up, "silu", None, 64, 8)
    dense = torch.ops.ternc.activate_quantize(
        gate.contiguous(), up.contiguous(), "silu", None, 64, 8
    )
    assert all(map(torch.equal, seen, dense))
    turned = torch.ops.ternc.activate_quantize(
        gate.transpose(0, 1), up.transpose(0, 1), "silu", None, 64, 8
    )
    assert torch.equal(turned[0], dense[0].transpose(0, 1))


# All


def test_threads_change_nothing():
    x, up = torch.randn(150, 1024), torch.randn(150, 1024)
    calls = [
        lambda: [torch.ops.ternc.hadamard(x, None, 1024)],
        lambda: torch.ops.ternc.activate_quantize(x, up, "gelu", None, 256, 8),
        lambda: torch.ops.ternc.norm_quantize(
            x, None, None, "rms", 1e-6, 0.0, False, None, 512, 8, True
        ),
    ]
    for call in calls:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(call())
        for one, *others in zip(*outputs, strict=True):
            assert all(torch.equal(one, other) for other in others)


def test_opcheck():
    x = torch.randn(3, 64)
    library = torch.ops.ternc
    signs = random_signs(64)
    for op, arguments in [
        (library.norm_quantize, (x, x[0], None, "rms", 1e-6, 0.0, True, signs, 64, 8, True)),
        (library.norm_quantize, (x, None, None, "layer", 1e-6, 0.0, True, None, 0, 8, False)),
        (library.activate_quantize, (x, x, "silu", signs, 32, 8)),
        (library.activate_quantize, (x, None, "gelu", None, 0, 4)),
        (library.hadamard, (x, signs, 64)),
    ]:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x: o.hadamard(x, None, 48), "block=48"),
        (lambda o, x: o.hadamard(x, None, 128), "does not divide width 64"),
        (lambda o, x: o.hadamard(x, x[0], 64), "signs"),
        (lambda o, x: o.hadamard(x.double(), None, 64), "x is"),
        (lambda o, x: o.activate_quantize(x, None, "tanh", None, 0, 8), "activation='tanh'"),
        (lambda o, x: o.activate_quantize(x, x[:2], "silu", None, 0, 8), "up"),
        (lambda o, x: o.activate_quantize(x, None, "silu", None, 0, 5), "bits=5"),
        (
            lambda o, x: o.norm_quantize(x, None, None, "batch", 1e-6, 0.0, True, None, 0, 8, True),
            "kind='batch'",
        ),
        (
            lambda o, x: o.norm_quantize(
                x, x[0, :5], None, "rms", 1e-6, 0.0, True, None, 0, 8, True
            ),
            "gain",
        ),
    ],
)
def test_what_the_kernels_refuse(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.ternc, torch.randn(3, 64))
