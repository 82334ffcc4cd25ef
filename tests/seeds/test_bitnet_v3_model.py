"""`ternc.bitnet_v3`'s model: cached decoding, generation, padding, forms of a call."""

import pytest
import torch
from bitnet_models import data, model

from ternc.errors import ConfigError, InputError


@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_is_the_whole_sequence(padded):
    made = model(activation_bits=None).eval()
    ids = data(2, 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        whole = made(ids, mask).logits
        output = made(ids[:, :4], mask[:, :4], use_cache=True)
        parts = [output.logits]
        for t in range(4, 7):
            cache = output.past_key_values
            output = made(ids[:, t : t + 1], mask[:, : t + 1], None, cache, use_cache=True)
            parts.append(output.logits)
    found = torch.cat(parts, 1)
    valid = mask.bool()
    assert (found[valid] - whole[valid]).abs().max() < 1e-5
    assert output.past_key_values[0][0].shape[2] == 7


def test_generation():
    made = model(activation_bits=None)
    ids = data(2, 4)
    greedy = made.generate(ids, max_length=12)
    assert greedy.shape == (2, 12) and made.training
    assert torch.equal(greedy, made.generate(ids, max_length=12, use_cache=False))
    torch.manual_seed(3)
    output = made.generate(ids, max_length=10, temperature=0.7, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(output, made.generate(ids, max_length=10, temperature=0.7, do_sample=True))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    longer = made.generate(padded, max_length=15, attention_mask=mask)
    assert torch.equal(longer[:, 3:], greedy)
    first = int(greedy[0, 4])
    stopped = made.generate(ids[:1], max_length=12, eos_token_id=first)
    assert stopped.shape[1] == 5


def test_left_padding_is_finite_and_changes_nothing():
    made = model(activation_bits=None).eval()
    ids = data(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), ids), 1)
    with torch.no_grad():
        found = made(padded, mask).logits
        assert found.isfinite().all()
        assert (found[:, 2:] - made(ids).logits).abs().max() < 1e-5


def test_call_forms():
    made = model()
    ids = data(2)
    output = made(ids, labels=ids)
    plain = made(ids, labels=ids, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.loss)
    assert torch.equal(output[1], output["logits"]) and len(list(output)) == 2
    with pytest.raises(InputError, match="max_position_embeddings"):
        made(torch.zeros(1, 5000, dtype=torch.long))
    with pytest.raises(InputError, match="attention_mask"):
        made(ids, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="num_heads=3"):
        model(num_heads=3)
