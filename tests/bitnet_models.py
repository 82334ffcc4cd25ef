"""Small models and batches that the tests of `ternc.bitnet_v3` share."""

import torch
from torch.utils.data import DataLoader

import ternc.bitnet_v3 as bitnet_v3

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
PLAIN = {
    "progressive_quantization": False,
    "adaptive_hadamard": False,
    "knowledge_distillation": False,
    "dynamic_regularization": False,
    "enhanced_ste": False,
}


def data(count=8, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, (count, length), generator=generator) * 8


def batches(**options):
    return DataLoader(data(**options), batch_size=4)


def model(**changes):
    torch.manual_seed(0)
    return bitnet_v3.BitNetV3Model(bitnet_v3.BitNetV3Config(**{**SMALL, **changes}))
