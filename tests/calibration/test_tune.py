"""Tuning: lowers the loss, touches scales, norms and biases only, leaves nothing behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ternc
from ternc.calibration.distance import default_loss, kl_divergence
from ternc.calibration.tune import Tuning, tune
from ternc.config import Config
from ternc.errors import ConfigError, InputError
from ternc.quantization import quantize


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 20, bias=False)

    def forward(self, ids):
        return {"logits": self.down(F.gelu(self.up(self.norm(self.embed(ids)))))}


def setup(planes=1, **options):
    torch.manual_seed(0)
    model = Model().eval()
    batches = [torch.randint(20, (16,)) for _ in range(8)]
    config = Config(planes=planes, group_size=16, activation_bits=None)
    return model, batches, quantize(model, config, calibration=batches, **options)


def mean_loss(q, model, batches):
    with torch.no_grad():
        return sum(float(default_loss(q(b), model(b), b)) for b in batches) / len(batches)


def test_tuning_lowers_the_loss_and_keeps_the_codes():
    model, batches, q = setup()
    before, codes = mean_loss(q, model, batches), q.up.state_dict()["trits"].clone()
    norm, table = q.norm.weight.clone(), q.embed.weight.clone()
    q.requires_grad_(False)
    q.norm.weight.requires_grad_()
    first, last = tune(q, model, batches, default_loss, Tuning(epochs=5, rate=0.02))
    assert last < first
    assert mean_loss(q, model, batches) < 0.8 * before
    assert torch.equal(q.up.state_dict()["trits"], codes)
    assert torch.equal(q.embed.weight, table) and not torch.equal(q.norm.weight, norm)
    assert q.norm.weight.requires_grad and not q.norm.bias.requires_grad
    assert not q.up.scale.requires_grad and "scale" in q.up._buffers
    assert all(p.grad is None for p in q.parameters())


def test_free_scales_are_tuned_too(tmp_path):
    model, batches, _ = setup()
    config = Config(planes=1, group_size=16, activation_bits=None, tie_scales=False)
    fitted, tuned = (
        quantize(model, config, calibration=batches, tuning=tuning)
        for tuning in (None, Tuning(epochs=5, rate=0.02))
    )
    assert tuned.up.scale.dim() == 2 and not torch.equal(tuned.up.scale, fitted.up.scale)
    assert mean_loss(tuned, model, batches) < mean_loss(fitted, model, batches)
    ternc.save(tuned, tmp_path)
    assert torch.equal(ternc.load(tmp_path, model=Model()).up.scale, tuned.up.scale)


def test_tuning_that_does_not_help_is_undone():
    model, batches, q = setup(planes=3)
    state = copy.deepcopy(q.state_dict())
    first, last = tune(q, model, batches, default_loss, Tuning(epochs=1, rate=0.9))
    assert not last < first
    assert all(torch.equal(state[name], value) for name, value in q.state_dict().items())
    assert not any(isinstance(p, nn.Parameter) for p in (q.up.scale, q.down.scale))


def test_tuned_scales_are_saved_exactly(tmp_path):
    _, batches, q = setup(tuning=Tuning(epochs=1))
    ternc.save(q, tmp_path)
    loaded = ternc.load(tmp_path, model=Model())
    assert torch.equal(loaded(batches[0])["logits"], q(batches[0])["logits"])
    assert q.up.state_dict()["scale"].dtype == torch.float16
    assert all("held-out loss" in row.reason for row in q._ternc_rows)


def test_tied_scales_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)).eval()
    model[2].weight = model[0].weight
    batches = [torch.randn(16, 32) for _ in range(4)]
    with torch.inference_mode():
        q = quantize(
            model, Config(planes=1, group_size=16), calibration=batches, tuning=Tuning(epochs=2)
        )
    assert q[0].scale is q[2].scale and q[0].packed_weight is q[2].packed_weight
    ternc.save(q, tmp_path)
    loaded = ternc.load(tmp_path, model=copy.deepcopy(model))
    assert torch.equal(loaded(batches[0]), q(batches[0]))


def test_two_tunings_are_one():
    results = [setup(tuning=Tuning(epochs=2, seed=3))[2].up.scale for _ in range(2)]
    assert torch.equal(*results)


def test_tuning_in_place_is_refused():
    with pytest.raises(ConfigError, match="inplace=False"):
        setup(tuning=Tuning(), inplace=True)


@pytest.mark.parametrize("values", [{"epochs": 0}, {"epochs": 1.5}, {"rate": 0.0}, {"rate": 2.0}])
def test_values_are_checked(values):
    with pytest.raises(ConfigError):
        Tuning(**values)


def test_kl_divergence_is_the_definition():
    p, q = torch.randn(4, 7), torch.randn(4, 7)
    wanted = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(q, p), wanted)
    assert kl_divergence(p, p).abs().max() < 1e-6


def test_default_loss_without_logits_is_one_minus_cosine_of_the_tokens():
    mask = torch.tensor([[1, 1, 0]])
    found, wanted = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    found[0, 2] = 1e3  # padding
    loss = default_loss((found,), (wanted,), {"attention_mask": mask})
    expected = 1 - F.cosine_similarity(found[0, :2], wanted[0, :2], dim=-1).mean()
    torch.testing.assert_close(loss, expected)


def test_outputs_without_tensors_are_refused():
    with pytest.raises(InputError, match="give loss="):
        default_loss("text", "text", None)
