"""dequantize: W from every layout, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch
from reference import CASES, dequantize_arguments, random_quantized

from ternc.errors import DifferentiationError, KernelError
from ternc.formats import pack
from ternc.formats.layouts import at_rest_layout
from ternc.runtime.ops import dequantize

pytestmark = pytest.mark.usefixtures("register_ops")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["resident", "at rest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(case, form, dtype):
    quantized = random_quantized(*case)
    target = "cpu" if form == "resident" else at_rest_layout(quantized.planes)
    arguments = dequantize_arguments(pack(quantized, target), dtype)
    expected = quantized.dequantize().to(dtype)
    assert torch.equal(dequantize.reference(*arguments), expected)
    assert torch.equal(torch.ops.ternc.dequantize(*arguments), expected)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    arguments = dequantize_arguments(pack(random_quantized(*case), "cpu"))
    torch.library.opcheck(torch.ops.ternc.dequantize, arguments)


def test_gradient_of_scales_is_refused():
    arguments = dequantize_arguments(pack(random_quantized(5, 20, 1), "cpu"))
    arguments[1].requires_grad_()
    with pytest.raises(DifferentiationError, match="use ternc::linear"):
        torch.ops.ternc.dequantize(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.zeros(3, dtype=torch.uint8)},
            "weight is torch.uint8 \\[3\\]; layout 'lanes x2'",
        ),
        ({0: torch.zeros(2, 13, 64)}, "weight is torch.float32"),
        ({1: torch.zeros(7)}, "scale is torch.float32 \\[7\\], not float32 \\[1\\] or \\[40\\]"),
        ({1: torch.zeros(40, dtype=torch.float16)}, "scale is torch.float16"),
        ({2: torch.zeros(40, 2, dtype=torch.uint8)}, "multiplier is torch.uint8 \\[40, 2\\]"),
        ({2: None}, "scale is torch.float32 \\[40\\], not float32 \\[40, 2\\]"),
        ({5: 0}, "for group_size=0"),
        ({6: 99}, "layout 99 is not known"),
        ({7: torch.float64}, "dtype torch.float64"),
        ({4: 131_076}, "in_features=131076 is over 131,072"),
    ],
)
def test_refused_arguments(change, message):
    arguments = list(dequantize_arguments(pack(random_quantized(40, 50, 2, 32), "cpu")))
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(KernelError, match=message):
        dequantize.reference(*arguments)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(KernelError, match=message):
        torch.ops.ternc.dequantize(*meta)
