"""KL and top-1 agreement: zero and one against itself, the definition against another."""

import pytest
import torch
from torch import nn

from ternc.errors import InputError
from ternc.eval import compare_logits


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 9)

    def forward(self, ids, attention_mask=None):
        return (self.table(ids),)


def test_a_model_agrees_with_itself():
    model, batches = Model(0), [torch.randint(9, (2, 5)) for _ in range(3)]
    found = compare_logits(model, model, batches)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1 and found.tokens == 30


def test_means_are_over_tokens_and_leave_padding_out():
    ours, theirs = Model(0), Model(1)
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = compare_logits(
        ours, theirs, [{"ids": ids, "attention_mask": mask}, torch.tensor([[8, 8]])]
    )
    kept = torch.tensor([0, 1, 2, 4, 8, 8])
    p, q = theirs.table(kept).log_softmax(-1), ours.table(kept).log_softmax(-1)
    assert found.tokens == 6
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


def test_no_batch_is_refused():
    with pytest.raises(InputError, match="no batch"):
        compare_logits(Model(0), Model(0), [])
