"""Configuration, perplexity, measured efficiency, multiple-choice tasks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ternc
from ternc.bitlinear.packing import memory_report
from ternc.bitnet_v3.samples import SAMPLES
from ternc.config import Config
from ternc.demo.measure import interleaved_medians
from ternc.errors import ConfigError, InputError
from ternc.train.config import (
    Distillation,
    Hadamard,
    Momentum,
    Optimization,
    Regularization,
    TrainConfig,
)
from ternc.train.preparation import finish
from ternc.train.schedule import Schedule
from ternc.train.site import sites
from ternc.train.task import call, example_of, logits_of, scored, to_device


@dataclasses.dataclass
class BitNetV3Config:
    """Model and techniques; every field changes behaviour.

    Raises:
        ConfigError: sizes that do not go together.
    """

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    intermediate_size: int | None = None
    """None: 8/3 of the width, up to a multiple of 32."""
    max_position_embeddings: int = 2048
    rope_base: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True
    progressive_quantization: bool = True
    mpq_stages: Any = dataclasses.field(
        default_factory=lambda: [
            {"epochs": 20, "bits": 8},
            {"epochs": 20, "bits": 4},
            {"epochs": 15, "bits": 2},
            {"epochs": 15, "bits": 1.58},
        ]
    )
    mpq_temperature: str = "linear"
    mpq_mode: str = "normalised"
    group_size: int | str | None = None
    activation_bits: int | None = 8
    adaptive_hadamard: bool = True
    hadamard_learnable_scale: bool = True
    hadamard_learnable_shift: bool = True
    knowledge_distillation: bool = True
    gakd_alpha: float = 0.7
    gakd_beta: float = 0.2
    gakd_gamma: float = 0.1
    gakd_temperature: float = 4.0
    gakd_gradient: str = "logit"
    dynamic_regularization: bool = True
    qap_initial_lambda: float = 0.1
    qap_schedule: str = "ramp"
    qap_decay_rate: float = 0.95
    enhanced_ste: bool = True
    ste_momentum: float = 0.9
    ste_power: float = 0.5
    learning_rate: float = 3e-4
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} is not an even "
                "number of columns a head"
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 32) * 32
        self.train_config()

    def train_config(self) -> TrainConfig:
        """The techniques as `ternc.train` has them."""
        schedule = Schedule(
            stages=self.mpq_stages,
            temperature=self.mpq_temperature,  # type: ignore[arg-type]
            mode=self.mpq_mode,  # type: ignore[arg-type]
        )
        return TrainConfig(
            weights=Config(
                planes=1,
                group_size=self.group_size,  # type: ignore[arg-type]
                activation_bits=self.activation_bits,
            ),
            schedule=schedule if self.progressive_quantization else None,
            hadamard=Hadamard(
                learn_scale=self.hadamard_learnable_scale,
                learn_shift=self.hadamard_learnable_shift,
            )
            if self.adaptive_hadamard
            else None,
            distillation=Distillation(
                self.gakd_alpha,
                self.gakd_beta,
                self.gakd_gamma,
                temperature=self.gakd_temperature,
                gradient=self.gakd_gradient,  # type: ignore[arg-type]
            )
            if self.knowledge_distillation
            else None,
            regularization=Regularization(
                strength=self.qap_initial_lambda,
                schedule=self.qap_schedule,  # type: ignore[arg-type]
                rate=self.qap_decay_rate,
            )
            if self.dynamic_regularization
            else None,
            momentum=Momentum(self.ste_momentum, self.ste_power) if self.enhanced_ste else None,
            optimization=Optimization(
                learning_rate=self.learning_rate, weight_decay=self.weight_decay
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


@torch.no_grad()
def compute_perplexity(model: nn.Module, test_loader: Any, device: Any = None) -> float:
    """exp(sum of the losses of all valid tokens / their number); batches as in `ternc.train`."""
    where = device or next(iter(model.state_dict().values())).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in test_loader:
        batch = to_device(batch, torch.device(where))
        example = example_of(batch)
        if example.targets is None and "input_ids" in example.kwargs:
            ids = example.kwargs["input_ids"]
            example = dataclasses.replace(example, targets=ids, shifted=True)
        logits, targets, valid = scored(logits_of(call(model, example)), example)
        losses = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        total, count = total + losses.item(), count + int(valid.sum())
    model.train(training)
    if not count:
        raise InputError("compute_perplexity: the loader has no token with a target")
    return math.exp(total / count)


@torch.no_grad()
def compute_efficiency_metrics(
    bitnet_model: nn.Module, baseline_model: nn.Module, test_input: Any, rounds: int = 10
) -> dict[str, float]:
    """Measured on this machine: time of one forward (median, interleaved) and bytes in memory.

    A model that is still trainable is packed first, in a copy, with its final quantisers.

    Returns:
        `speedup`, `memory_reduction` (percent), `bitnet_seconds`, `baseline_seconds`,
        `bitnet_bytes`, `baseline_bytes`.
    """
    packed = bitnet_model
    if sites(bitnet_model):
        packed = ternc.quantize(finish(copy.deepcopy(bitnet_model)), inplace=True)
    modes = [(model, model.training) for model in (packed, baseline_model)]
    arguments = test_input if isinstance(test_input, tuple) else (test_input,)
    keywords: dict[str, Any] = {}
    if isinstance(test_input, Mapping):
        arguments, keywords = (), dict(test_input)
    calls: dict[str, Callable[[], object]] = {
        "bitnet": lambda: packed(*arguments, **keywords),
        "baseline": lambda: baseline_model(*arguments, **keywords),
    }
    for model, _ in modes:
        model.eval()
    seconds = interleaved_medians(calls, rounds)
    for model, training in modes:
        model.train(training)
    held = {"bitnet": memory_report(packed), "baseline": memory_report(baseline_model)}
    own, other = held["bitnet"]["total"], held["baseline"]["total"]
    return {
        "speedup": seconds["baseline"] / seconds["bitnet"],
        "memory_reduction": 100 * (1 - own / other),
        "bitnet_seconds": seconds["bitnet"],
        "baseline_seconds": seconds["baseline"],
        "bitnet_bytes": float(own),
        "baseline_bytes": float(other),
    }


@torch.no_grad()
def evaluate_downstream_tasks(
    model: nn.Module,
    tasks: Sequence[str] = ("hellaswag", "mmlu", "truthfulqa"),
    data: str | Path | None = None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Multiple choice by likelihood: the choice whose tokens have the highest mean log-probability.

    Args:
        data: a folder with <task>.jsonl, one {"prompt", "choices", "answer"} a line. Without it a
            few questions written for this package are asked: enough to see that a model runs, not
            to rate it.
        tokenize: text -> ids; default: the bytes of UTF-8, for vocabularies from 256.
        limit: the first so many questions of each task.

    Returns:
        By task: `accuracy`, `count`, `chance`, and `source`, where the questions came from.

    Raises:
        ConfigError: an unknown task.
        InputError: a question that is malformed, a token outside of the vocabulary.
    """
    encode = tokenize or (lambda text: list(text.encode()))
    training = model.training
    model.eval()
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        questions, source = _questions(task, data)
        questions = questions[:limit]
        right = [_answer(model, question, encode) == question["answer"] for question in questions]
        results[task] = {
            "accuracy": sum(right) / len(right),
            "count": len(right),
            "chance": sum(1 / len(q["choices"]) for q in questions) / len(questions),
            "source": source,
        }
    model.train(training)
    return results


def _questions(task: str, data: str | Path | None) -> tuple[list[dict[str, Any]], str]:
    if data is None:
        if task not in SAMPLES:
            raise ConfigError(
                f"task {task!r} has no sample here ({', '.join(SAMPLES)}); give data=folder with "
                f"{task}.jsonl"
            )
        return list(SAMPLES[task]), "sample written for this package"
    path = Path(data) / f"{task}.jsonl"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; one JSON object a line is wanted")
    lines = path.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines if line.strip()]
    for number, question in enumerate(questions, 1):
        if not {"prompt", "choices", "answer"} <= set(question):
            raise InputError(f"{path}: question {number} lacks 'prompt', 'choices' or 'answer'")
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions, str(path)


def _answer(
    model: nn.Module, question: Mapping[str, Any], encode: Callable[[str], Sequence[int]]
) -> int:
    device = next(iter(model.state_dict().values())).device
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    scores = []
    prompt = list(encode(question["prompt"]))
    for choice in question["choices"]:
        tokens = list(encode(choice))
        ids = torch.tensor([prompt + tokens], device=device)
        if isinstance(known, int) and int(ids.max()) >= known:
            raise InputError(
                f"token {int(ids.max())} is not in the model's vocabulary of {known}; give "
                "tokenize=, text -> ids"
            )
        logits = logits_of(model(ids))[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        scores.append(chosen.mean().item())
    return max(range(len(scores)), key=scores.__getitem__)
