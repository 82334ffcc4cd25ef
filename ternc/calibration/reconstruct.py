"""Codes, scales, norms and biases of a quantised model <- trained against the float model.

    whole model:  min of mean over batches of loss(quantised(batch), float(batch))
    windows:      min of huber(blocks(x) - float blocks(f)), a few blocks at a time, front to back

The codes go from soft to hard on the way (`SoftLayer`). x are the inputs that the quantised blocks
in front give, f those of the float model. One batch in eight is not trained on: where the error
there has not fallen, what was trained is put back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from ternc.calibration.batches import call, evaluating, held_out
from ternc.calibration.distance import Loss
from ternc.calibration.execution import Chain, Leaves, record
from ternc.calibration.soft import SoftLayer, sharpness_at
from ternc.calibration.tune import unit_of
from ternc.errors import ConfigError
from ternc.modules.linear import TernaryLinear
from ternc.progress import track

SOFT_PART = 0.8
"""Part of the steps in which codes may change; the rest is for what belongs to the hard ones."""


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How much at a time, how long and how fast.

    Raises:
        ConfigError: a value is not allowed.
    """

    window: int | None = None
    """Blocks trained together, windows overlapping by half; None: the whole model, by its outputs.
    The whole is better where memory holds its training: a 0.9 M byte model at one plane lost 0.035
    bits per byte instead of 0.062, and 0.044 by windows of 2.
    """
    steps: int = 400
    """Of each window; a step sees one batch."""
    rate: float = 3e-3
    """Adam's step on latents, in codes; falls to zero along a cosine."""
    scale_rate: float = 2e-3
    """Adam's step on scales, norms and biases, in units of each tensor's root mean square."""
    autocast: str | None = None
    """"bfloat16" or "float16": dtype of products in training."""
    seed: int = 0
    """Order of the batches."""

    def __post_init__(self) -> None:
        for name in ("window", "steps"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a positive int")
        for name in ("rate", "scale_rate"):
            if not 0.0 < float(getattr(self, name)) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not between 0 and 1")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise ConfigError(f"autocast={self.autocast!r} is not None, 'bfloat16' or 'float16'")


@dataclasses.dataclass(frozen=True)
class Window:
    """What was trained together, and its error on batches not trained on."""

    layers: tuple[str, ...]
    before: float
    after: float
    """Where this is not less than `before`, the window is what it was."""


@torch.inference_mode(mode=False)
def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    plan: Reconstruction,
    progress: bool | None = None,
) -> list[Window]:
    """Trains the packed layers of `model` in place; activations are not quantised meanwhile.

    Args:
        teacher: the float model that `model` was made of.
        loss: of the whole model's outputs; windows of blocks have their own.

    Returns:
        One entry a window; none where windows are asked for and there is no chain of blocks.
    """
    trainable = dict(_trainable(model, teacher))
    with evaluating(teacher), evaluating(model):
        if plan.window is None:
            layers = [SoftLayer(module, *known) for module, known in trainable.items()]

            def error(batch: int) -> torch.Tensor:
                with torch.no_grad():
                    target = call(teacher, batches[batch])
                return loss(call(model, batches[batch]), target, batches[batch])

            return [_train_window([model], layers, error, len(batches), plan, progress)]
        return [
            window
            for walk in _walks(model, teacher, batches)
            for window in _train_chain(walk, trainable, plan, progress)
        ]


def _trainable(
    model: nn.Module, teacher: nn.Module
) -> Iterator[tuple[TernaryLinear, tuple[str, nn.Module]]]:
    """Packed layers with name and float original; not those tied to others, held exactly, or whose
    planes have scales of their own.
    """
    originals = dict(teacher.named_modules())
    packed = {m: name for name, m in model.named_modules() if isinstance(m, TernaryLinear)}
    shared: dict[int, int] = {}
    for layer in packed:
        shared[id(layer.packed_weight)] = shared.get(id(layer.packed_weight), 0) + 1
    for layer, name in packed.items():
        alone = shared[id(layer.packed_weight)] == 1 and layer.free_planes == 1
        if name in originals and alone and not layer.exact:
            yield layer, (name, originals[name])


def _walks(model: nn.Module, teacher: nn.Module, batches: Sequence[Any]) -> Iterator[_Walk]:
    """The chains of blocks that both models have, in the order of the float model."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}
    originals = {name: m for name, m in teacher.named_modules() if name in layers}
    places = {module: name for name, module in model.named_modules()}
    chains = {places[c.container]: c for c in record(model, layers, batches[0]).chains}
    places = {module: name for name, module in teacher.named_modules()}
    for theirs in record(teacher, originals, batches[0]).chains:
        if (ours := chains.get(places[theirs.container])) is not None:
            yield _Walk(
                ours,
                theirs,
                [ours.first_inputs(model, batch) for batch in batches],
                [theirs.first_inputs(teacher, batch) for batch in batches],
            )


@dataclasses.dataclass
class _Walk:
    """Two chains, and the inputs of one block of each for every batch."""

    ours: Chain
    theirs: Chain
    inputs: list[Leaves]
    float_inputs: list[Leaves]
    index: int = 0

    def advance(self, blocks: int) -> None:
        for index in range(self.index, self.index + blocks):
            for batch in range(len(self.inputs)):
                self.inputs[batch] = self.ours.advance(index, self.inputs[batch])
                self.float_inputs[batch] = self.theirs.advance(index, self.float_inputs[batch])
        self.index += blocks

    def run(self, chain: Chain, inputs: Leaves, end: int) -> torch.Tensor:
        """First floating-point output of block `end` - 1, from the inputs of block `index`."""
        for index in range(self.index, end - 1):
            inputs = chain.advance(index, inputs)
        leaves = pytree.tree_leaves(chain.run(end - 1, inputs))
        return next(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())


def _train_chain(
    walk: _Walk,
    trainable: Mapping[TernaryLinear, tuple[str, nn.Module]],
    plan: Reconstruction,
    progress: bool | None,
) -> Iterator[Window]:
    assert plan.window is not None
    count, stride = len(walk.ours.keys), max(1, plan.window // 2)
    for first in range(0, count, stride):
        end = min(first + plan.window, count)
        blocks = [walk.ours.block(index) for index in range(first, end)]
        layers = [
            SoftLayer(module, *trainable[module])
            for block in blocks
            for module in block.modules()
            if isinstance(module, TernaryLinear) and module in trainable
        ]
        if layers:
            goals = [walk.run(walk.theirs, inputs, end).float() for inputs in walk.float_inputs]
            error = _distance(walk, goals, end)
            yield _train_window(blocks, layers, error, len(goals), plan, progress)
        if end == count:
            return
        walk.advance(stride)


def _distance(walk: _Walk, goals: list[torch.Tensor], end: int) -> Callable[[int], torch.Tensor]:
    """Batch -> Huber loss of the window's outputs, in units of the goals' root mean square."""
    unit = max(math.sqrt(sum(float(g.square().mean()) for g in goals) / len(goals)), 1e-9)

    def error(batch: int) -> torch.Tensor:
        found = walk.run(walk.ours, walk.inputs[batch], end)
        return F.huber_loss(found.float() / unit, goals[batch] / unit)

    return error


def _train_window(
    parts: list[nn.Module],
    layers: list[SoftLayer],
    error: Callable[[int], torch.Tensor],
    count: int,
    plan: Reconstruction,
    progress: bool | None,
) -> Window:
    """Trains `layers` and every other Parameter of one dimension in `parts`, if that helps."""
    judged = [i for i in range(count) if held_out(i, count)] or list(range(count))
    used = [i for i in range(count) if not held_out(i, count)]
    state = [{name: v.clone() for name, v in part.state_dict().items()} for part in parts]
    before = sum(float(error(i)) for i in judged) / len(judged)
    _train(parts, layers, error, used, plan, progress)
    after = sum(float(error(i)) for i in judged) / len(judged)
    if not after < before:
        for part, values in zip(parts, state, strict=True):
            part.load_state_dict(values)
    return Window(tuple(layer.name for layer in layers), before, after)


def _train(
    parts: list[nn.Module],
    layers: list[SoftLayer],
    error: Callable[[int], torch.Tensor],
    used: list[int],
    plan: Reconstruction,
    progress: bool | None,
) -> None:
    wanted = {p: p.requires_grad for part in parts for p in part.parameters()}
    others = [p for p in wanted if p.dim() == 1 and p.is_floating_point()]
    for parameter in wanted:
        parameter.requires_grad_(parameter.dim() == 1 and parameter.is_floating_point())
    groups = [{"params": [layer.latent for layer in layers], "lr": plan.rate}]
    groups += [
        {"params": [parameter], "lr": plan.scale_rate * unit_of(parameter)}
        for parameter in (*(layer.scale for layer in layers), *others)
    ]
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(plan.seed)
    soft = max(1, round(SOFT_PART * plan.steps))
    device = layers[0].scale.device.type
    dtype = getattr(torch, plan.autocast) if plan.autocast else None
    try:
        for layer in layers:
            layer.enter()
        for step in track(range(plan.steps), plan.steps, "reconstruct", progress):
            if step % len(used) == 0:
                order = torch.randperm(len(used), generator=generator).tolist()
            for layer in layers:
                layer.sharpness = sharpness_at(step / soft)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / plan.steps)) / 2
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
                value = error(used[order[step % len(used)]])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    finally:
        for layer in layers:
            layer.leave()
        for parameter, requires_grad in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
