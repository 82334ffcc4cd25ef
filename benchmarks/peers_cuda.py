"""What else multiplies a weight on a GPU: torch in bf16 (cuBLAS, Inductor), fp8 and int8; gemlite.

Each is (x [M, K], rows N, copies) -> Way, or None where it is not here or takes no such shape.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

RAMP_US, READ_BYTES_US = 1.87, 3.15e6
"""A cold read of b bytes takes RAMP_US + b / READ_BYTES_US (fit of one H100, 4 to 128 MiB)."""
PEAK_OPS_US = {"bf16": 989e6, "fp8": 1979e6, "int8": 1979e6}
"""Dense tensor-core peaks of the same GPU by its datasheet."""

CHECKED_TOKENS = 64
LOOSE = 0.06
"""Relative error up to which a peer counts as right."""

Copies = Callable[[int], int]
"""Bytes of a weight -> how many of them are rotated."""


@dataclasses.dataclass
class Way:
    """One way to compute the product: a call for every copy of its weight."""

    name: str
    calls: list[Callable[[], torch.Tensor]]
    weight_bytes: int
    operation: str

    def floor(self, rows: int, columns: int, tokens: int) -> float:
        """Microseconds below which no kernel of this kind gets, with a warm GPU."""
        nbytes = self.weight_bytes + 2 * tokens * (rows + columns)
        work = 2 * rows * columns * tokens / PEAK_OPS_US[self.operation]
        return max(RAMP_US + nbytes / READ_BYTES_US, work)


def bf16_way(x: torch.Tensor, rows: int, copies: Copies) -> Way:
    nbytes = 2 * rows * x.shape[1]
    weights = [torch.randn(rows, x.shape[1], device="cuda", dtype=x.dtype)
               for _ in range(copies(nbytes))]  # fmt: skip
    return Way("bf16", [lambda w=w: F.linear(x, w) for w in weights], nbytes, "bf16")


def inductor_way(x: torch.Tensor, rows: int, copies: Copies) -> Way | None:
    """bf16 as Inductor tunes it for one token: a Triton reduction in place of cuBLAS."""
    if x.shape[0] != 1:
        return None
    nbytes = 2 * rows * x.shape[1]
    weights = [torch.randn(rows, x.shape[1], device="cuda", dtype=x.dtype)
               for _ in range(copies(nbytes))]  # fmt: skip
    run = _inductor(*x.shape, rows)
    return Way("bf16 inductor", [lambda w=w: run(x, w) for w in weights], nbytes, "bf16")


@functools.lru_cache(maxsize=1)
def _inductor(*problem: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """F.linear, compiled for one problem; beyond a limit of them it would run uncompiled."""
    torch._dynamo.reset()
    options = {"coordinate_descent_tuning": True}
    return torch.compile(lambda x, w: F.linear(x, w), dynamic=False, options=options)


def fp8_way(x: torch.Tensor, rows: int, copies: Copies) -> Way | None:
    """Row-scaled fp8 with the activations quantised by a Triton kernel, checked loosely."""
    columns = x.shape[1]
    if rows % 16 or columns % 16:
        return None
    import fp8

    weight = torch.randn(rows, columns, device="cuda")
    scale = weight.abs().amax(1) / fp8.MOST
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    weights = [codes.clone() for _ in range(copies(codes.nbytes))]

    def run(w: torch.Tensor) -> torch.Tensor:
        q, sx = fp8.quantize_rows(x)
        return torch._scaled_mm(
            q, w.T, scale_a=sx, scale_b=scale[None], out_dtype=x.dtype, use_fast_accum=True
        )

    exact = x[:CHECKED_TOKENS].double() @ weight.double().T
    error = (run(weights[0])[:CHECKED_TOKENS].double() - exact).norm() / exact.norm()
    assert error < LOOSE, f"fp8 peer is wrong: relative error {error:.3g}"
    return Way("fp8 rowwise", [lambda w=w: run(w) for w in weights], codes.nbytes, "fp8")


def int8_way(x: torch.Tensor, rows: int, copies: Copies) -> Way | None:
    """torch._int_mm alone: no quantisation, no scales; it wants more than 16 tokens."""
    tokens, columns = max(x.shape[0], 32), x.shape[1]
    if rows % 8 or columns % 8:
        return None
    q = torch.randint(-127, 128, (tokens, columns), device="cuda", dtype=torch.int8)
    weights = [torch.randint(-1, 2, (rows, columns), device="cuda", dtype=torch.int8)
               for _ in range(copies(rows * columns))]  # fmt: skip
    calls = [lambda w=w: torch._int_mm(q, w.T) for w in weights]
    return Way("int8 raw", calls, rows * columns, "int8")


def gemlite_version() -> str:
    """Of the installed package, or of one whose folder is on the path."""
    if importlib.util.find_spec("gemlite") is None:
        return "not run: not installed"
    import gemlite

    return gemlite.__version__


@functools.cache
def _gemlite() -> Any:
    """The package with the tiles that it brings for H100s, which it would not find by name."""
    import gemlite

    tiles = Path(gemlite.__file__).parent / "configs" / "h100.json"
    gemlite.load_config(str(tiles), print_error=False)
    return gemlite


def gemlite_way(bits: int, x: torch.Tensor, rows: int, copies: Copies) -> Way | None:
    """gemlite's int8 products of ternary weights kept as int8 or as 2 bits, checked loosely."""
    columns = x.shape[1]
    if importlib.util.find_spec("gemlite") is None or rows % 128 or columns % 128:
        return None
    helper = _gemlite().helper
    codes = torch.randint(-1, 2, (rows, columns), device="cuda", dtype=torch.int8)
    if bits == 8:
        maker = helper.A8W8_int8_dynamic(dtype=x.dtype)
        scale = torch.full((rows, 1), 0.01, device="cuda")

        def make() -> Any:
            return maker.from_weights(codes.clone(), scales=scale)
    else:
        ternary = helper.A8W158_INT_dynamic(dtype=x.dtype)

        def make() -> Any:
            return ternary.from_weights(codes.to(x.dtype), torch.tensor(0.01))

    nbytes = rows * columns * bits // 8
    layers = [make()]
    layers += [copy.deepcopy(layers[0]) for _ in range(copies(nbytes) - 1)]
    exact = 0.01 * (x[:CHECKED_TOKENS].double() @ codes.double().T)
    error = (layers[0](x)[:CHECKED_TOKENS].double() - exact).norm() / exact.norm()
    assert error < LOOSE, f"gemlite A8W{bits} is wrong: relative error {error:.3g}"
    return Way(f"gemlite A8W{bits}", [lambda f=f: f(x) for f in layers], nbytes, "int8")


ALL: dict[str, Callable[[torch.Tensor, int, Copies], Way | None]] = {
    "bf16": bf16_way,
    "inductor": inductor_way,
    "fp8": fp8_way,
    "int8": int8_way,
    "gemlite": functools.partial(gemlite_way, 8),
    "gemlite2": functools.partial(gemlite_way, 2),
}
