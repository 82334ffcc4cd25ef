"""Terms of distillation: each has a gradient, checked numerically; masks, projections, balance."""

import pytest
import torch
from torch import nn
from training import tiny_model, windows

import ternc
from ternc.errors import ConfigError, TrainingError
from ternc.train import Distillation, Distiller, TrainConfig, Trainer, prepare
from ternc.train.distill import feature_distance, kl_divergence, logit_gradient_distance
from ternc.train.task import cross_entropy, example_of


def numeric(function, x, index, step=1e-3):
    up, down = x.clone(), x.clone()
    up.view(-1)[index] += step
    down.view(-1)[index] -= step
    return (function(up) - function(down)) / (2 * step)


TERMS = {
    "kl": lambda s, t, v: kl_divergence(s, t, v, temperature=2.0),
    "gradient": logit_gradient_distance,
    "feature": lambda s, t, v: feature_distance({"a": s}, {"a": t}),
}


@pytest.mark.parametrize("name", TERMS)
def test_every_term_has_a_true_gradient(name):
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher, valid = torch.randn(6, 5, dtype=torch.float64), torch.tensor([1, 1, 0, 1, 1, 1]).bool()

    def value(x):
        return TERMS[name](x, teacher, valid)

    loss = value(student)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss > 0 and gradient.abs().sum() > 0
    for index in (0, 7, 29):
        expected = numeric(value, student.detach(), index, 1e-2).item()
        assert gradient.flatten()[index].item() == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_logit_term_is_the_difference_of_loss_gradients():
    student = torch.randn(4, 7, requires_grad=True)
    teacher = torch.randn(4, 7, requires_grad=True)
    targets = torch.randint(7, (4,))
    gradients = [
        torch.autograd.grad(nn.functional.cross_entropy(z, targets, reduction="sum"), z)[0]
        for z in (student, teacher)
    ]
    expected = (gradients[0] - gradients[1]).square().sum(1).mean()
    found = logit_gradient_distance(student, teacher, torch.ones(4).bool())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_kl_is_a_mean_over_valid_tokens():
    student, teacher = torch.randn(2, 10, 5), torch.randn(2, 10, 5)
    valid = torch.zeros(20).bool()
    valid[[1, 4, 17]] = True
    found = kl_divergence(student.view(20, 5), teacher.view(20, 5), valid)
    picked = nn.functional.kl_div(
        student.view(20, 5)[valid].log_softmax(-1),
        teacher.view(20, 5)[valid].log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    assert found.item() == pytest.approx(picked.item(), rel=1e-5)
    repeated = kl_divergence(
        student.view(20, 5).repeat(3, 1), teacher.view(20, 5).repeat(3, 1), valid.repeat(3)
    )
    assert repeated.item() == pytest.approx(found.item(), rel=1e-5)


def test_padding_has_no_part():
    ids = windows(2, 17)
    batch = {"ids": ids, "labels": ids.clone()}
    batch["labels"][:, 9:] = -100
    model, config = tiny_model(), Distillation(alpha=1.0)
    student = prepare(tiny_model())
    distiller = Distiller(student, model, config)
    example = example_of(batch)
    output = student(ids)
    changed = output.detach().clone()
    changed[:, 9:] += 100 * torch.randn_like(changed[:, 9:])
    assert torch.equal(
        distiller.terms(output, example)["kl"].detach(), distiller.terms(changed, example)["kl"]
    )


def test_padding_has_no_part_in_features():
    features, known = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    changed = torch.where(mask[..., None].bool(), features, torch.randn(2, 6, 5))
    found = feature_distance({"a": features}, {"a": known}, mask=mask)
    assert torch.equal(found, feature_distance({"a": changed}, {"a": known}, mask=mask))
    assert found != feature_distance({"a": features}, {"a": known})
    alone = feature_distance({"a": features[mask.bool()]}, {"a": known[mask.bool()]})
    assert found.item() == pytest.approx(alone.item(), rel=1e-6)


def test_features_project_to_the_teachers_width_and_are_trained():
    torch.manual_seed(3)
    student, teacher = tiny_model(32), tiny_model(48)
    config = TrainConfig(
        distillation=Distillation(alpha=0, gamma=1.0, feature_layers=("blocks.0.attention.out",))
    )
    trainer = Trainer(student, config, teacher, log_every=1, progress=False)
    (projection,) = trainer.distiller.projections.values()
    assert projection.weight.shape == (48, 32)
    held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert id(projection.weight) in held
    before = projection.weight.detach().clone()
    trainer.train([windows(4)], num_epochs=2)
    assert not torch.equal(projection.weight, before)
    assert not trainer.distiller._student_features


def test_balance_brings_terms_to_their_share():
    ids = windows(4)
    student, teacher = prepare(tiny_model()), tiny_model()
    config = Distillation(alpha=50.0, beta=0.01, gamma=3.0, balance=True, balance_target=0.25)
    distiller = Distiller(student, teacher, config)
    example = example_of(ids)
    distiller.measure_balance(student, example, lambda output: cross_entropy(output, ids))
    weights = [site.weight for site in ternc.sites(student)]

    def norm(value):
        found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        return torch.stack([g.norm() for g in found if g is not None]).norm().item()

    output = student(example.args[0])
    task = norm(cross_entropy(output, ids))
    for term in distiller.terms(output, example).values():
        assert norm(term) == pytest.approx(0.25 * task, rel=1e-3)


def test_cached_logits_are_the_teachers():
    calls = []
    teacher = tiny_model()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student = prepare(tiny_model())
    distiller = Distiller(student, teacher, Distillation(cache=True))
    for batch in (windows(2), windows(2, seed=4), windows(2)):
        example = example_of(batch)
        logits = distiller._teacher_logits(example)
        with torch.no_grad():
            assert torch.equal(logits, teacher.eval()(example.args[0]))
        calls.pop()
    assert len(calls) == 2


def test_cached_logits_serve_shuffled_batches():
    calls = []
    teacher = tiny_model()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student = prepare(tiny_model())
    distiller = Distiller(student, teacher, Distillation(cache=True))
    ids = windows(6)
    plain = {"ids": ids[:, :-1], "labels": ids[:, 1:]}
    expected = distiller._teacher_logits(example_of(plain))
    for order in ([5, 0, 3], [1, 1]):
        shuffled = {name: tensor[order] for name, tensor in plain.items()}
        assert torch.equal(distiller._teacher_logits(example_of(shuffled)), expected[order])
    assert len(calls) == 1
    distiller._teacher_logits(example_of({"ids": ids[:2, :-2], "labels": ids[:2, 1:-1]}))
    assert len(calls) == 2, "another width is another sequence"


def test_mistakes_are_named():
    student = prepare(tiny_model())
    with pytest.raises(TrainingError, match="cache"):
        Distiller(student, tiny_model(), Distillation(gamma=1.0, cache=True))
    with pytest.raises(TrainingError, match="is not a site"):
        Distiller(student, tiny_model(), Distillation(gamma=1.0, feature_layers=("lm_head",)))
    with pytest.raises(TrainingError, match="the teacher has no module"):
        Distiller(student, nn.Linear(2, 2), Distillation(gamma=1.0))
    with pytest.raises(ConfigError, match="gradient='loss'"):
        Distillation(gradient="loss")
