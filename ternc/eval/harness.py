"""Model, names of tasks -> scores by lm-eval's own harness, where it is installed (extra `eval`).

The harness builds the requests and the metrics; here a request becomes log-likelihoods or a greedy
continuation of a model that is called as `model(ids [1, T])`. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import evaluating
from ternc.errors import InputError, MissingExtraError
from ternc.eval.outputs import logits_of
from ternc.eval.text import score_tokens

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]


def score_tasks(
    model: nn.Module,
    tasks: Sequence[str],
    *,
    encode: Encode | None = None,
    decode: Decode | None = None,
    folder: Path | None = None,
    context: int = 1024,
    limit: int | None = None,
    few_shot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as the harness gives them.

    Args:
        tasks: names that the harness knows, or that `folder` defines.
        encode: text -> token ids; None: the tokens are the UTF-8 bytes.
        decode: its inverse; only for tasks that generate, and only beside `encode`.
        folder: more tasks, as the harness writes them.
        context: tokens that the model is given at most.
        limit: examples of each task.

    Raises:
        MissingExtraError: lm-eval is not installed.
        InputError: a task is not known, or generates and `decode` is missing.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval", "scoring its tasks") from error
    if encode is None:
        encode, decode = _to_bytes, _from_bytes
    answers = Answers(model, encode, decode, context)

    class Adapter(LM):
        def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
            return [answers.likelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
            return [answers.text_likelihood(*request.args) for request in requests]

        def generate_until(self, requests: Iterable[Any]) -> list[str]:
            return [answers.continuation(*request.args) for request in requests]

    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise InputError(f"lm-eval knows no task {unknown[0]!r}; give folder= where one is defined")
    with evaluating(model):
        found = simple_evaluate(
            Adapter(), tasks=list(tasks), task_manager=manager, limit=limit,
            num_fewshot=few_shot, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, float)}
        for task, scores in found["results"].items()
    }


class Answers:
    """What a model answers to the three kinds of requests."""

    def __init__(
        self, model: nn.Module, encode: Encode, decode: Decode | None, context: int
    ) -> None:
        self._model, self._encode, self._decode, self._context = model, encode, decode, context
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def likelihood(self, before: str, text: str) -> tuple[float, bool]:
        """ln p(text | before), and whether every token of it is the likeliest.

        An empty `before` is a line's end: the model has to be given something.
        """
        before = before or "\n"
        start = len(self._encode(before))
        ids = list(self._encode(before + text))
        first = max(1, min(start, len(ids) - 1))
        ids, dropped = ids[-self._context - 1 :], max(0, len(ids) - self._context - 1)
        first = max(1, first - dropped)
        logits = self._logits(ids[:-1])[first - 1 :]
        wanted = torch.tensor(ids[first:], device=self._device)
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
        same = bool((logits.argmax(-1) == wanted).all())
        return float(chosen.sum(dtype=torch.float64)), same

    def text_likelihood(self, text: str) -> float:
        """ln p of a whole text, in windows."""
        ids = list(self._encode("\n" + text))
        score = score_tokens(
            self._model, ids, len(text.encode()), context=self._context, progress=False
        )
        return -score.nats

    def continuation(self, before: str, settings: dict[str, Any]) -> str:
        """The greedy continuation, up to the first of `until` or so many tokens."""
        if self._decode is None:
            raise InputError("the task generates text; give decode=, the inverse of encode=")
        until = settings.get("until", [])
        until = [until] if isinstance(until, str) else list(until)
        ids = list(self._encode(before or "\n"))
        start = len(ids)
        for _ in range(int(settings.get("max_gen_toks", 256))):
            ids.append(int(self._logits(ids[-self._context :])[-1].argmax()))
            found = self._decode(ids[start:])
            ends = [found.index(stop) for stop in until if stop in found]
            if ends:
                return found[: min(ends)]
        return self._decode(ids[start:])

    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        """fp32 [T, V]."""
        batch = torch.tensor([list(ids)], device=self._device)
        return logits_of(self._model(batch))[0].float()


def _to_bytes(text: str) -> list[int]:
    return list(text.encode())


def _from_bytes(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
