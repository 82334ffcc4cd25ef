"""Cosine and neighbour overlap: one against itself, known values where neighbours are swapped."""

import pytest
import torch
from torch import nn

from ternc.errors import InputError
from ternc.eval import compare_embeddings, mean_pooled


class Encoder(nn.Module):
    """Embeds a token as one row of a table."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(rows)

    def forward(self, ids, attention_mask=None):
        return self.table[ids]


def test_an_encoder_agrees_with_itself():
    torch.manual_seed(0)
    model = Encoder(torch.randn(12, 6))
    found = compare_embeddings(model, model, list(torch.arange(12).view(4, 3, 1)))
    assert found.cosine == pytest.approx(1) and found.overlap == 1
    assert found.count == 12 and found.neighbours == 10


def test_neighbours_that_change():
    """On a circle, nearest one: row 1 is near 0 in one model, near 2 in the other."""
    angles = torch.tensor([0.0, 0.1, 1.0, 1.05])
    moved = torch.tensor([0.0, 0.9, 1.0, 1.05])
    ours, theirs = (Encoder(torch.stack([a.cos(), a.sin()], 1)) for a in (moved, angles))
    found = compare_embeddings(ours, theirs, [torch.arange(4).view(4, 1)], neighbours=1)
    # 0 -> 1 in both; 1 -> 2 against 0; 2 -> 3 and 3 -> 2 in both.
    assert found.overlap == pytest.approx(3 / 4)
    assert found.cosine == pytest.approx((3 + torch.tensor(0.8).cos().item()) / 4, rel=1e-5)


def test_pooling_leaves_padding_out():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    found = mean_pooled((hidden,), {"attention_mask": torch.tensor([[1, 1, 0]])})
    torch.testing.assert_close(found, torch.tensor([[3.0, 1.0]]) / 10**0.5)


def test_too_few_are_refused():
    model = Encoder(torch.randn(5, 3))
    with pytest.raises(InputError, match="5 embeddings"):
        compare_embeddings(model, model, [torch.arange(5).view(5, 1)])
