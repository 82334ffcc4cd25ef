"""A model with a bit of everything, packed and saved: what the tests of checkpoints share."""

import torch
from torch import nn

from ternc.config import Config
from ternc.quantization import quantize


class Net(nn.Module):
    """A bit of everything: linears, one over the budget, attention, a tied pair, buffers."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, ids):
        x = self.down(self.up(self.block(self.embed(ids))).relu())
        x = self.norm((self.second(self.first(x)) + x).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)
CONFIGS = {
    "default": Config(),
    "one plane": Config(planes=1, group_size=None),
    "groups": Config(planes=2, group_size=16, activation_bits=None),
    "tensor": Config(planes=2, group_size="tensor"),
    "partly": Config(exclude=("*.q_proj", "up", "block.linear1")),
}


def make(config="default", seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.down.weight.data = 0.2 * torch.randint(-1, 2, (32, 40)).float()
    return quantize(model, CONFIGS[config])


def assert_equal_models(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(a(IDS), b(IDS))
