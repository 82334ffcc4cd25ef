"""What a recorded call says: groups, order, chains, and that a chain replays the model."""

import weakref

import pytest
import torch
from torch import nn

from ternc.calibration.activations import Activations
from ternc.calibration.batches import evaluating
from ternc.calibration.execution import record


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x, mask=None, *, scale=1.0):
        y = self.q(x) * self.k(x).sigmoid() * scale
        return x + self.down(y if mask is None else y * mask)


class Model(nn.Module):
    """Blocks in a list, with something before and after; `skip` breaks the chain."""

    def __init__(self, width=8, skip=False):
        super().__init__()
        self.before = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.unused = nn.Linear(width, width)
        self.skip = skip

    def forward(self, x, mask=None):
        x = self.before(x)
        for block in self.blocks:
            y = block(x, mask, scale=0.5)
            x = y + x if self.skip else y
        return self.head(x)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def recorded(model, batch):
    with evaluating(model):
        return record(model, linears(model), batch)


def test_groups_are_layers_of_one_input_in_order():
    torch.manual_seed(0)
    execution = recorded(Model(), torch.randn(5, 8))
    assert execution.groups[0] == ("before",)
    assert execution.groups[1] == ("blocks.0.q", "blocks.0.k")
    assert execution.groups[2] == ("blocks.0.down",)
    assert execution.groups[-1] == ("head",)
    assert execution.calls["unused"] == 0 and execution.calls["head"] == 1


def test_a_chain_is_found_and_a_broken_one_is_not():
    torch.manual_seed(0)
    batch = {"x": torch.randn(5, 8), "mask": torch.rand(5, 1)}
    assert len(recorded(Model(), batch).chains[0].keys) == 3
    assert recorded(Model(skip=True), batch).chains == []


def test_a_chain_with_state_is_not_replayed():
    class Counting(Block):
        calls = 0

        def forward(self, x, mask=None, *, scale=1.0):
            self.calls += 1
            return super().forward(x, mask, scale=scale) + self.calls

    torch.manual_seed(0)
    model = Model()
    model.blocks[1] = Counting(8)
    assert recorded(model, torch.randn(5, 8)).chains == []


def test_recording_keeps_no_input_alive_that_the_model_lets_go_of():
    torch.manual_seed(0)
    model, seen, alive = Model(), [], []
    for block in model.blocks:
        block.down.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
        block.q.register_forward_pre_hook(
            lambda *_: alive.append(sum(ref() is not None for ref in seen))
        )
    execution = recorded(model, torch.randn(5, 8))
    assert alive[:3] == [0, 0, 0], "inputs of earlier blocks were kept"
    assert len(execution.chains[0].keys) == 3 and len(execution.groups) == 8


def true_inputs(model, name, batches):
    """Inputs of a layer in calls of the whole model, as [M, K]."""
    found = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found])


def test_moments_follow_the_model_as_it_changes():
    """Through chains and without, also after layers in front have been replaced."""
    for skip in (False, True):
        torch.manual_seed(0)
        model = Model(skip=skip).eval()
        batches = [{"x": torch.randn(7, 8), "mask": torch.rand(7, 1)} for _ in range(3)]
        activations = Activations(model, batches, recorded(model, batches[0]))
        for name in ("before", "blocks.0.q", "blocks.0.down", "blocks.2.q", "head"):
            with evaluating(model):
                split = activations.moments(name, model.get_submodule(name))
            rows = true_inputs(model, name, batches)
            assert (split.fitted.count, split.held_out.count) == (14, 7)
            torch.testing.assert_close(split.fitted.second, rows[:14].T @ rows[:14] / 14)
            torch.testing.assert_close(split.held_out.second, rows[14:].T @ rows[14:] / 7)
            model.get_submodule(name).weight.data *= 0.9


def test_padding_that_the_batch_names_is_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.fc(x)

    torch.manual_seed(0)
    model, mask = Masked(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": torch.randn(2, 3, 4), "attention_mask": mask} for _ in range(2)]
    activations = Activations(model, batches, recorded(model, batches[0]))
    with evaluating(model):
        split = activations.moments("fc", model.fc)
    assert (split.fitted.count, split.held_out.count) == (3, 3)
    rows = batches[0]["x"][mask.bool()]
    torch.testing.assert_close(split.fitted.second, rows.T @ rows / 3)


def test_evaluating_puts_everything_back():
    model = Model().train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_decoder_with_a_cache_is_a_chain():
    """Its cache of keys and values would make a second run of a block another one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(32, (2, 7))}
    assert len(recorded(model, batch).chains[0].keys) == 3
    assert model.config.use_cache
