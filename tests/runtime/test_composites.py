"""What Inductor takes apart in training on a GPU gives what the op gives."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ternc.runtime import inductor
from ternc.runtime.ops import fake_quantize

pytestmark = pytest.mark.usefixtures("register_ops")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_activation_quantizer(bits, dtype):
    x = torch.randn(6, 37)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    x = x.to(dtype)
    values, expected = (
        f(x, bits) for f in (fake_quantize.activation_composite, fake_quantize.activation_reference)
    )
    assert values.dtype == dtype
    assert torch.equal(values.isnan(), expected.isnan()) and expected[1:3].isnan().all()
    torch.testing.assert_close(values[3:], expected[3:], rtol=1e-6, atol=0)
    assert torch.equal(values[0], expected[0])


def test_table(monkeypatch):
    """Where a device is in the set, tracing with the table leaves none of the ops in a graph."""
    x = torch.randn(4, 16)
    assert inductor._decompositions([x]) is None

    def f(x):
        return torch.ops.ternc.fake_quantize_act(2 * x, 8)

    monkeypatch.setattr(inductor, "COMPOSED_DEVICES", {"cpu"})
    traced = make_fx(f, decomposition_table=inductor._decompositions([x]))(x)
    assert not any("ternc" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), f(x))
