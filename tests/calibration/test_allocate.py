"""Spending bits: greedy by loss per bit, two planes at once where one brings nothing."""

import weakref

import pytest
import torch
from torch import nn

from ternc.calibration.allocate import Cost, bits_at_rest, measured_costs, spend
from ternc.calibration.calibrator import Layer
from ternc.calibration.distance import default_loss
from ternc.config import Config
from ternc.formats import fit
from ternc.formats.packed import pack
from ternc.modules.conversion import spelling_of
from ternc.runtime import ops


def costs(*losses):
    return {k: Cost(float(k), loss) for k, loss in enumerate(losses, 1)}


def test_the_most_sensitive_layer_gets_the_bits():
    layers = {"a": costs(1.0, 0.5, 0.4), "b": costs(9.0, 1.0, 0.1), "c": costs(0.2, 0.1, 0.1)}
    assert spend(layers, 3.0) == {"a": 1, "b": 1, "c": 1}
    assert spend(layers, 4.0) == {"a": 1, "b": 2, "c": 1}
    assert spend(layers, 5.0) == {"a": 1, "b": 3, "c": 1}
    assert spend(layers, 100.0) == {"a": 3, "b": 3, "c": 2}


def test_two_planes_at_once():
    assert spend({"a": costs(1.0, 1.0, 0.0)}, 3.0) == {"a": 3}


def test_planes_that_do_harm_are_not_bought():
    assert spend({"a": costs(1.0, 2.0, 3.0)}, 9.0) == {"a": 1}


def test_bits_are_those_of_the_stored_weight():
    ops.register()
    w = torch.randn(24, 100)
    for choices in ({"group_size": 32}, {"group_size": None}, {"group_size": 32, "tie_scales": 0}):
        config = Config(**{**choices, "tie_scales": bool(choices.get("tie_scales", True))})
        for planes in (1, 2, 3):
            packed = pack(fit.fit(w, planes, config, 0), "cpu")
            assert bits_at_rest(24, 100, planes, config) == 8 * packed.nbytes_at_rest


class Tapped(nn.Module):
    """Blocks in a row; the output is of the last, or of all of them."""

    def __init__(self, blocks, every):
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(blocks))
        self.head, self.every = nn.Linear(32, 9), every

    def forward(self, ids):
        x = self.embedding(ids)
        total = 0
        for block in self.blocks:
            x = block(x)
            total = total + x if self.every else x
        return self.head(total)


def layers_of(model):
    return {
        name: Layer.of(module, spelling_of(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("every", [False, True], ids=["last", "all"])
def test_costs_are_those_of_the_model_run_whole(every):
    ops.register()
    torch.manual_seed(0)
    model = Tapped(3, every)
    batches = [torch.randint(20, (16,)) for _ in range(3)]
    config = Config(group_size=16, rotation="none")
    found = measured_costs(model, layers_of(model), batches, config, default_loss, False)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    with torch.no_grad():
        targets = [model(batch) for batch in batches]
        for name, costs_of_layer in found.items():
            module = model.get_submodule(name)
            w = module.weight.data.clone()
            losses = {}
            for planes in (1, 2, 3):
                module.weight.data = fit.fit(w, planes, config, 0).dequantize()
                losses[planes] = sum(
                    float(default_loss(model(b), t, b))
                    for b, t in zip(batches, targets, strict=True)
                ) / len(batches)
            module.weight.data = w
            for planes in (1, 2):
                torch.testing.assert_close(costs_of_layer[planes].loss, losses[planes])
            assert 0.5 < costs_of_layer[3].loss / losses[3] < 2.0
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_kept_does_not_grow_with_depth():
    ops.register()
    model, batches = Tapped(10, every=False).eval(), [torch.randint(20, (8,)) for _ in range(4)]
    outputs, most, calls = [], [], []

    def note(module, args, output):
        outputs.append(weakref.ref(output))
        calls.append(module)

    for block in model.blocks:
        block.register_forward_hook(note)

    def loss(output, target, batch):
        most.append(len({id(x) for ref in outputs if (x := ref()) is not None}))
        return default_loss(output, target, batch)

    config = Config(group_size=16, rotation="none")
    measured_costs(model, layers_of(model), batches, config, loss, False)
    assert max(most) <= 2 * len(batches) + 2, "outputs of one block, inputs of the next"
