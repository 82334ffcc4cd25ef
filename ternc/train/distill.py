"""Gradient-aware knowledge distillation (GAKD): student, teacher, batch -> terms of the loss.

    L = task CE + alpha T^2 KL(p_teacher || p_student) + beta G + gamma F

G in its default mode is ||p_s - p_t||^2, the squared difference of d CE / d logits; the modes that
compare weight gradients are in gradients.py. F compares normalised outputs of chosen sites with the
teacher's at the same places, through projections where the widths differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ternc.errors import TrainingError
from ternc.train.config import Distillation
from ternc.train.sharding import world_size
from ternc.train.site import sites, unwrap
from ternc.train.task import Example, call, logits_of, scored


def kl_divergence(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """T^2 KL(p_teacher || p_student) of logits [n, V], a mean over the tokens in `valid` [n]."""
    log_student = F.log_softmax(student.float() / temperature, -1)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return temperature**2 * _mean(divergence, valid)


def logit_gradient_distance(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """||d CE / d z_s - d CE / d z_t||^2 = ||p_s - p_t||^2: the one-hot targets cancel."""
    difference = F.softmax(student.float(), -1) - F.softmax(teacher.float(), -1)
    return _mean(difference.square().sum(-1), valid)


def feature_distance(
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    projections: nn.ModuleDict | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over layers and tokens of ||a - b||^2, a and b of unit length; features [..., C].

    Args:
        mask: 1 for tokens, 0 for padding; leaves out the padding of features of its shape [..., C].
    """
    terms = []
    for name, features in student.items():
        key = name.replace(".", "_")
        if projections is not None and key in projections:
            features = projections[key](features)
        a, b = (F.normalize(value.float(), dim=-1) for value in (features, teacher[name].detach()))
        distance = (a - b).square().sum(-1)
        tokens = torch.ones_like(distance) if mask is None else mask
        masked = tokens.shape == distance.shape
        terms.append(_mean(distance, tokens) if masked else distance.mean())
    return torch.stack(terms).mean()


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return (values * valid).sum() / valid.sum().clamp(min=1)


TaskLoss = Callable[[Any], torch.Tensor]
"""Output of the student -> the task's loss."""


class Distiller(nn.Module):
    """The teacher's part of the loss. Its Parameters are the projections of features.

    Made before the optimiser: `projections` exist from the start and are trained with the student.
    """

    projections: nn.ModuleDict
    balance: torch.Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module, config: Distillation) -> None:
        super().__init__()
        self.config = config
        # In a list: the teacher's weights are neither trained nor saved.
        self._teacher = [teacher]
        self.projections = nn.ModuleDict()
        self.register_buffer("balance", torch.ones(3))
        self._student_features: dict[str, torch.Tensor] = {}
        self._teacher_features: dict[str, torch.Tensor] = {}
        self._logits: dict[bytes, torch.Tensor] = {}
        self._watched = 0
        if config.gamma:
            self._watch_features(student, teacher)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def terms(self, output: Any, example: Example) -> dict[str, torch.Tensor]:
        """The weighted terms for a student's output, by name; each a scalar with gradient."""
        config = self.config
        with torch.no_grad():
            known = self._teacher_logits(example)
        student, _, valid = scored(logits_of(output), example, config.ignore_index)
        teacher, _, _ = scored(known, example, config.ignore_index)
        found: dict[str, torch.Tensor] = {}
        if config.alpha:
            found["kl"] = config.alpha * kl_divergence(student, teacher, valid, config.temperature)
        if config.beta and config.gradient == "logit":
            found["gradient"] = config.beta * logit_gradient_distance(student, teacher, valid)
        if config.gamma:
            seen = self._student_features.keys() & self._teacher_features.keys()
            if len(seen) < self._watched:
                raise TrainingError(
                    "the models were compiled before their features were watched: make the Trainer "
                    "before the first call of a compiled model"
                )
            distance = feature_distance(
                self._student_features,
                self._teacher_features,
                self.projections,
                example.kwargs.get("attention_mask"),
            )
            found["feature"] = config.gamma * distance
        if config.balance:
            factors = dict(zip(_TERMS, self.balance.unbind(), strict=True))
            found = {name: factors[name] * term for name, term in found.items()}
        return found

    @torch.enable_grad()
    def measure_balance(self, student: nn.Module, example: Example, task: TaskLoss) -> None:
        """Sets the factor of every term from the gradient norms at the student's sites.

        A factor brings its term to `balance_target` times the norm of the task's gradient. Runs the
        uncompiled student once; the graph is used once for each term.
        """
        with torch.compiler.set_stance("force_eager"):
            self._measure_balance(student, example, task)

    def _measure_balance(self, student: nn.Module, example: Example, task: TaskLoss) -> None:
        self.balance.fill_(1.0)
        inner = unwrap(student)
        output = call(inner, example)
        weights = [site.weight for site in sites(inner) if site.weight.requires_grad]
        if not weights:
            raise TrainingError(
                "balance=True compares gradients at the model's sites, and it has none; "
                "ternc.train.training_report(model) says why"
            )
        if any(hasattr(weight, "full_tensor") for weight in weights):
            raise TrainingError(
                "balance=True measures gradients that sharded weights (FSDP2) do not give; set it "
                "to False, or use DDP"
            )
        terms = self.terms(output, example)
        found = [_gradient_norm(value, weights) for value in (task(output), *terms.values())]
        wanted, *norms = _mean_of_processes(torch.stack(found)).unbind()
        for name, norm in zip(terms, norms, strict=True):  # after the graphs: they hold the factors
            if bool(norm > 0):
                self.balance[_TERMS.index(name)] = self.config.balance_target * wanted / norm
        self.release()

    def release(self) -> None:
        """Forgets the features of the last batch."""
        self._student_features.clear()
        self._teacher_features.clear()

    def _teacher_logits(self, example: Example) -> torch.Tensor:
        if not self.config.cache:
            return self._ask_teacher(example)
        keys = _digests(example)
        known = [self._logits[key] for key in keys if key in self._logits]
        if len(known) == len(keys):
            return torch.cat(known).to(next(iter(_tensors(example))).device)
        logits = self._ask_teacher(example)
        for key, part in zip(keys, logits.cpu().chunk(len(keys)), strict=True):
            self._logits[key] = part
        return logits

    def _ask_teacher(self, example: Example) -> torch.Tensor:
        in_training = [module for module in self.teacher.modules() if module.training]
        for module in in_training:
            module.training = False
        logits = logits_of(call(self.teacher, example))
        for module in in_training:
            module.training = True
        return logits

    def _watch_features(self, student: nn.Module, teacher: nn.Module) -> None:
        if self.config.cache:
            raise TrainingError(
                "cache=True keeps the teacher's logits and gamma > 0 needs its features: "
                "set one of them to False or 0"
            )
        inside = {site.name: site.module for site in sites(student)}
        names = _chosen(list(inside), self.config.feature_layers)
        self._watched = len(names)
        for name in names:
            if name not in inside:
                raise TrainingError(f"feature layer {name!r} is not a site; sites: {list(inside)}")
            try:
                known = unwrap(teacher).get_submodule(name)
            except AttributeError as error:
                raise TrainingError(
                    f"the teacher has no module {name!r} to compare features with; name layers "
                    "that both models have in feature_layers"
                ) from error
            widths = inside[name].out_features, _width(known)
            if widths[1] is not None and widths[0] != widths[1]:
                device = inside[name].weight.device
                made = nn.Linear(widths[0], widths[1], bias=False, device=device)
                self.projections[name.replace(".", "_")] = made
            _keep_output(inside[name], name, self._student_features)
            _keep_output(known, name, self._teacher_features)


def _mean_of_processes(values: torch.Tensor) -> torch.Tensor:
    """The same on every process: their factors must not differ."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def _gradient_norm(value: torch.Tensor, weights: list[nn.Parameter]) -> torch.Tensor:
    found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in found if g is not None]).norm()


_TERMS = ("kl", "gradient", "feature")


def _chosen(names: list[str], wanted: tuple[str, ...] | int) -> list[str]:
    """The names asked for, or so many of all, evenly spaced, the last included."""
    if not isinstance(wanted, int):
        return list(wanted)
    count = min(wanted, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def _width(module: nn.Module) -> int | None:
    """Output features of a linear in either spelling."""
    return getattr(module, "out_features", getattr(module, "nf", None))


def _keep_output(module: nn.Module, name: str, into: dict[str, torch.Tensor]) -> None:
    def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        into[name] = output

    module.register_forward_hook(keep)


def _tensors(example: Example) -> Iterator[torch.Tensor]:
    for value in (*example.args, *example.kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value


def _digests(example: Example) -> list[bytes]:
    """Content of the inputs, sequence by sequence: a shuffled batch has the same ones. One for the
    whole where the inputs do not all have a row a sequence.
    """
    tensors = [tensor.detach().cpu() for tensor in _tensors(example)]
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    parts = zip(*tensors, strict=True) if len(rows) == 1 and rows != {0} else [tensors]
    return [_digest(part) for part in parts]


def _digest(tensors: Iterable[torch.Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
