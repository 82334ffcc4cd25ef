"""Alignment of weight gradients: 1/2 mean_i ||g_s,i - g_t,i||^2 / ||g_t,i||^2 over the sites i.

g = d CE / d W of the weight that the product uses, the quantised one. Its gradient with respect to
the student's Parameters is a Hessian-vector product, H (g_s - g_t):

    hvp     a central difference, two ordinary backward passes with W + e v and W - e v in place of
            the quantised W. Perturbing the master weight instead would move no trit.
    exact   double backward; eager only, without fused attention. For tests.

The teacher's weight of the same name must have the same shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ternc.errors import TrainingError
from ternc.train.site import Site, sites, unwrap

STEP = 1e-3
"""||e v|| as a share of ||W||, all sites together: 0.13 % off the double backward in fp32."""

ScalarLoss = Callable[[nn.Module], torch.Tensor]
"""Model -> its task loss on the batch at hand."""


def effective_gradients(
    model: nn.Module, loss: ScalarLoss, *, create_graph: bool = False
) -> list[torch.Tensor]:
    """d loss / d W of the quantised weight of every site, [out_features, in_features]."""
    found = sites(model)
    offsets = [torch.zeros_like(site.module.matrix(), requires_grad=True) for site in found]
    with _offsets(found, offsets):
        value = loss(model)
    return list(torch.autograd.grad(value, offsets, create_graph=create_graph))


def teacher_gradients(model: nn.Module, teacher: nn.Module, loss: ScalarLoss) -> list[torch.Tensor]:
    """d loss / d W of the teacher's weights at the student's sites, in the student's basis.

    Raises:
        TrainingError: the teacher has no weight of that name and shape, or weights are sharded.
    """
    found = sites(model)
    if any(hasattr(site.weight, "full_tensor") for site in found):
        raise TrainingError("weight gradients of sharded models are not aligned; use 'logit'")
    weights = [_teacher_weight(teacher, site) for site in found]
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(teacher), weights)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    aligned = []
    for site, gradient in zip(found, gradients, strict=True):
        gradient = gradient.t() if site.module.transposed else gradient
        rotation = site.module.settings.rotation
        # dL/d(W R) = (dL/dW) R for an orthogonal R.
        aligned.append(rotation.rotate(gradient.contiguous()) if rotation else gradient)
    return aligned


def alignment(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """1/2 mean_i ||g_s,i - g_t,i||^2 / ||g_t,i||^2."""
    terms = [
        (a - b).square().sum() / b.square().sum().clamp(min=1e-30)
        for a, b in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean() / 2


def add_alignment_gradient(
    model: nn.Module, loss: ScalarLoss, teacher: list[torch.Tensor], weight: float
) -> torch.Tensor:
    """Adds the gradient of weight * alignment to `.grad` by two perturbed passes; returns it."""
    found = sites(model)
    state = _random_state(found)
    student = effective_gradients(model, loss)
    value = alignment(student, teacher)
    direction = [
        (a - b) / b.square().sum().clamp(min=1e-30) / len(found)
        for a, b in zip(student, teacher, strict=True)
    ]
    size = torch.stack([d.norm() for d in direction]).norm()
    if not bool(size > 0):
        return value
    reach = torch.stack([site.module.values().norm() for site in found]).norm()
    step = (STEP * reach / size).item()
    with _added_to_gradients(model):
        for sign in (1.0, -1.0):
            _restore_random(state)
            with _offsets(found, [sign * step * d for d in direction]):
                (sign * weight / (2 * step) * loss(model)).backward()
    return value


def add_exact_alignment_gradient(
    model: nn.Module, loss: ScalarLoss, teacher: list[torch.Tensor], weight: float
) -> torch.Tensor:
    """The same by double backward, of the uncompiled model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        inner = unwrap(model)
        value = alignment(effective_gradients(inner, loss, create_graph=True), teacher)
        with _added_to_gradients(inner):
            (weight * value).backward()
    return value.detach()


def _teacher_weight(teacher: nn.Module, site: Site) -> torch.Tensor:
    try:
        weight: Any = unwrap(teacher).get_submodule(site.name).weight
    except AttributeError as error:
        raise TrainingError(
            f"{site.name}: the teacher has no weight of that name to align gradients with; "
            "use gradient='logit'"
        ) from error
    if not isinstance(weight, torch.Tensor) or weight.shape != site.weight.shape:
        raise TrainingError(
            f"{site.name}: the teacher's weight is {list(weight.shape)}, the student's "
            f"{list(site.weight.shape)}; use gradient='logit'"
        )
    return weight


@contextlib.contextmanager
def _added_to_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients made inside are summed over processes and added to those from before."""
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    yield
    for parameter, before in held:
        if parameter.grad is not None and dist.is_initialized():
            dist.all_reduce(parameter.grad)
        if before is not None:
            parameter.grad = before if parameter.grad is None else before + parameter.grad


@contextlib.contextmanager
def _offsets(found: list[Site], offsets: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the offsets are added to the quantised weights of the sites."""
    for site, offset in zip(found, offsets, strict=True):
        site.module.offset = offset
    try:
        yield
    finally:
        for site in found:
            site.module.offset = None


def _random_state(found: list[Site]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dropout must draw the same numbers in every pass."""
    on_gpu = bool(found) and found[0].weight.is_cuda
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None


def _restore_random(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
