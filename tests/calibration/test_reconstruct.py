"""Reconstruction: lowers the error, leaves packed layers and nothing else behind."""

import copy

import pytest
import torch
from torch import nn

import ternc
from ternc.calibration.distance import default_loss
from ternc.calibration.reconstruct import Reconstruction, reconstruct
from ternc.calibration.soft import Staircase
from ternc.config import Config
from ternc.errors import ConfigError
from ternc.quantization import quantize

BLOCKS = Reconstruction(window=2, steps=60, rate=0.02)
WHOLE = Reconstruction(steps=60, rate=0.02)


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64, bias=bias), nn.Linear(64, 32, bias=bias)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(Block(bias=i == 1) for i in range(3))
        self.head = nn.Linear(32, 20)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def setup(config=None, **options):
    torch.manual_seed(0)
    model = Model().eval()
    batches = [torch.randint(20, (8, 4)) for _ in range(8)]
    config = config or Config(planes=1, group_size=16, activation_bits=None)
    return model, batches, quantize(model, config, calibration=batches, **options)


def squares(output, target, batch):
    return (output - target).square().mean()


def distance(q, model, batches):
    with torch.no_grad():
        return sum(float((q(b) - model(b)).square().mean()) for b in batches) / len(batches)


@pytest.mark.parametrize(
    "plan, options",
    [
        (BLOCKS, {}),
        (WHOLE, {}),
        (WHOLE, {"planes": 2, "rotation": "hadamard"}),
        (BLOCKS, {"tie_scales": False}),
    ],
)
def test_reconstruction_brings_the_model_closer(plan, options, tmp_path):
    config = Config(**{"planes": 1, "group_size": 16, "activation_bits": None, **options})
    model, batches, q = setup(config)
    before, codes = distance(q, model, batches), q.blocks[1].up.state_dict()["trits"].clone()
    head = copy.deepcopy(q.head.state_dict())
    windows = reconstruct(q, model, batches, squares, plan)
    assert [len(window.layers) for window in windows] == ([7] if plan is WHOLE else [4, 4])
    assert all(window.after < window.before for window in windows)
    assert distance(q, model, batches) < before
    assert not torch.equal(q.blocks[1].up.state_dict()["trits"], codes)
    if plan is BLOCKS:
        assert all(torch.equal(head[name], value) for name, value in q.head.state_dict().items())
    assert all("forward" not in vars(module) for module in q.modules())
    assert all(p.requires_grad and p.grad is None for p in q.parameters())
    ternc.save(q, tmp_path)
    loaded = ternc.load(tmp_path, model=Model())
    assert torch.equal(loaded(batches[0]), q(batches[0]))


def test_quantize_reconstructs_says_so_and_repeats_itself():
    made = [setup(reconstruction=BLOCKS)[2] for _ in range(2)]
    states = [q.state_dict() for q in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    reasons = {row.name: row.reason for row in ternc.report(made[0]).rows}
    assert "codes reconstructed" in reasons["blocks.0.up"]
    assert reasons["head"].endswith("not reconstructed")


def test_reconstruction_that_does_not_help_is_undone():
    model, batches, q = setup(Config(planes=3, group_size=16, activation_bits=None))
    state = copy.deepcopy(q.state_dict())
    plan = Reconstruction(steps=2, rate=0.9, scale_rate=0.9, autocast="bfloat16")
    windows = reconstruct(q, model, batches, default_loss, plan)
    assert not any(window.after < window.before for window in windows)
    assert all(torch.equal(state[name], value) for name, value in q.state_dict().items())


def test_a_sharp_staircase_is_the_rounding_and_its_slope_is_its_derivative():
    u = torch.linspace(-3, 3, 200, dtype=torch.float64, requires_grad=True)
    sharp = Staircase.apply(u, 1e4, 1)
    torch.testing.assert_close(sharp, u.detach().round().clamp(-1, 1), atol=1e-9, rtol=0)
    assert torch.autograd.gradcheck(lambda x: Staircase.apply(x, 5.0, 4), u)


def test_reconstruction_in_place_or_without_data_is_refused():
    with pytest.raises(ConfigError, match="inplace=False"):
        setup(reconstruction=WHOLE, inplace=True)
    with pytest.raises(ConfigError, match="reconstruction needs calibration"):
        quantize(Model(), reconstruction=WHOLE)


@pytest.mark.parametrize(
    "values", [{"window": 0}, {"steps": True}, {"rate": 0.0}, {"autocast": "int8"}]
)
def test_values_are_checked(values):
    with pytest.raises(ConfigError):
        Reconstruction(**values)


def test_windows_of_blocks_that_were_rotated_are_refused():
    options = {"example_inputs": (torch.zeros(1, 4, dtype=torch.long),), "reconstruction": BLOCKS}
    with pytest.raises(ConfigError, match="window=None"):
        setup(Config(planes=1, group_size=16, rotation="hadamard"), **options)
