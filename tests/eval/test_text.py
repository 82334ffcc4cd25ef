"""Perplexity and bits per byte against models whose answers are known."""

import math

import pytest
import torch
from torch import nn

from ternc.errors import InputError
from ternc.eval import score_text, score_tokens


class Fixed(nn.Module):
    """Always the same distribution over 256 tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


class Bigram(nn.Module):
    """Logits from the token before; remembers the windows that it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 256)
        self.windows = []

    def forward(self, ids):
        self.windows.append(ids.shape)
        return {"logits": self.table(ids)}


def test_a_uniform_model_has_eight_bits_a_byte():
    text = "four score" * 10
    score = score_text(Fixed(torch.zeros(256)), text)
    assert score.perplexity == pytest.approx(256, rel=1e-5)
    assert score.tokens == 99 and score.bytes == 100
    assert score.bits_per_byte == pytest.approx(8 * 99 / 100, rel=1e-5)


def test_a_certain_model_has_perplexity_one():
    logits = torch.full((256,), -100.0)
    logits[ord("a")] = 100.0
    assert score_text(Fixed(logits), "a" * 50).perplexity == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("context", "overlap", "batch"), [(2, 0, 1), (7, 3, 1), (7, 5, 4), (50, 0, 2), (1000, None, 1)]
)
def test_every_token_is_predicted_once_whatever_the_windows(context, overlap, batch):
    """A model that looks one token back sees all it needs in any window."""
    model, text = Bigram(), "the same answer, however it is cut into windows; naïve"
    ids = torch.tensor(list(text.encode()))
    logits = model.table(ids[:-1])
    wanted = nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    score = score_text(model, text, context=context, overlap=overlap, batch=batch)
    assert score.nats == pytest.approx(float(wanted), rel=1e-5)
    assert score.tokens == len(ids) - 1 and score.bytes == len(ids) > len(text)
    assert all(width <= context and rows <= batch for rows, width in model.windows)


def test_tokens_of_a_tokenizer_keep_bits_per_byte_per_byte():
    score = score_tokens(Fixed(torch.zeros(256)), [1, 2, 3], size=12)
    assert score.bits_per_byte == pytest.approx(2 * 8 / 12)
    assert score.to_dict()["perplexity"] == pytest.approx(math.exp(score.nats / 2))


def test_bad_inputs_are_refused():
    model = Fixed(torch.zeros(256))
    with pytest.raises(InputError, match="two are wanted"):
        score_text(model, "a")
    with pytest.raises(InputError, match="overlap"):
        score_text(model, "abc", context=4, overlap=3)
    with pytest.raises(InputError, match="logits"):
        score_text(Flat(), "ab")


class Flat(nn.Module):
    def forward(self, ids):
        return ids.float()
