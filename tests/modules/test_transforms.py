"""TernaryLinear under torch.func and forward mode: the derivatives that backward gives."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import ternc
from ternc.config import Config
from ternc.errors import DifferentiationError
from ternc.modules.linear import TernaryLinear


@pytest.mark.parametrize("setting", [{}, {"rotation": "hadamard"}, {"tie_scales": False}], ids=str)
def test_transforms_differentiate_as_backward_does(setting):
    config = Config(planes=2, group_size=16, **setting)
    layer = ternc.quantize(nn.Linear(64, 8), config).requires_grad_(False)
    x, t = torch.randn(3, 64), torch.randn(3, 64)
    y, w = layer(x), layer.weight
    value, tangent = torch.func.jvp(layer, (x,), (t,))
    assert torch.equal(value, y)
    torch.testing.assert_close(tangent, t @ w.T)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
    assert torch.equal(dual.primal, y)
    torch.testing.assert_close(dual.tangent, t @ w.T)
    layer.bias.requires_grad_()
    gradient = torch.func.grad(lambda z: layer(z).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * y @ w)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), w)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), w)
    assert torch.equal(torch.vmap(layer)(x), y)
    torch.vmap(layer)(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))


@pytest.mark.parametrize("options", [None, {"inner": "aot_eager"}], ids=str)
def test_transforms_inside_compiled_code(options):
    """Of a layer packed before: in Dynamo's graph as in eager code, with other backends too."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = ternc.quantize(nn.Linear(64, 8), Config(planes=2)).requires_grad_(False)
    x, t, w = torch.randn(3, 64), torch.randn(3, 64), layer.weight

    def derivatives(x, t):
        gradient = torch.func.grad(lambda z: layer(z).square().sum())(x)
        return gradient, torch.func.jvp(layer, (x,), (t,))[1], layer(x)

    backend = {"backend": "ternc", "options": options} if options else {"backend": "eager"}
    gradient, tangent, y = torch.compile(derivatives, fullgraph=True, **backend)(x, t)
    torch.testing.assert_close(gradient, 2 * y @ w)
    torch.testing.assert_close(tangent, t @ w.T)
    fast = torch.compile(layer, **backend)
    assert torch.equal(fast(x), y)
    torch.testing.assert_close(torch.func.grad(lambda z: fast(z).square().sum())(x), gradient)
    assert torch.equal(fast(x), y)
    torch._dynamo.reset()  # which else runs TernaryLinear as it is from now on


def test_transforms_say_that_they_do_not_reach_scales():
    layer = TernaryLinear.from_linear(nn.Linear(64, 8), Config(planes=2)).scale_requires_grad_()
    with pytest.raises(DifferentiationError, match=r"scale_requires_grad_\(False\)"):
        torch.func.grad(lambda z: layer(z).sum())(torch.randn(3, layer.in_features))
