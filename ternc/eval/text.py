"""Model, text -> perplexity and bits per byte.

    perplexity = exp(sum of -ln p(token) / tokens);  bits per byte = sum of -log2 p(token) / bytes

Long text is cut into windows of the context length; a window is given the end of the one before as
context, so that every token is predicted once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ternc.calibration.batches import evaluating
from ternc.errors import InputError
from ternc.eval.outputs import logits_of
from ternc.progress import track


@dataclasses.dataclass(frozen=True)
class TextScore:
    """What a model made of a text."""

    nats: float
    """Sum of -ln p over the predicted tokens."""
    tokens: int
    """Predicted tokens: all but the first, which nothing comes before."""
    bytes: int
    """UTF-8 bytes of the whole text."""

    @property
    def perplexity(self) -> float:
        """Per token; comparable only between models of one tokenizer."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between all models on one text."""
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        """Fields and ratios as plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def score_text(
    model: nn.Module,
    text: str,
    encode: Callable[[str], Sequence[int]] | None = None,
    *,
    context: int = 1024,
    overlap: int | None = None,
    batch: int = 1,
    progress: bool | None = None,
) -> TextScore:
    """Scores `text` under a causal language model, called as `model(ids [B, T])`.

    Args:
        encode: text -> token ids; None: the tokens are the UTF-8 bytes.
        context: tokens of a window, at least 2.
        overlap: tokens of a window that are context only; default a quarter of `context`.
        batch: windows of one call.

    Raises:
        InputError: the text has fewer than two tokens, or the windows make no sense.
    """
    ids = list(text.encode() if encode is None else encode(text))
    return score_tokens(
        model,
        ids,
        len(text.encode()),
        context=context,
        overlap=overlap,
        batch=batch,
        progress=progress,
    )


def score_tokens(
    model: nn.Module,
    ids: Sequence[int],
    size: int,
    *,
    context: int = 1024,
    overlap: int | None = None,
    batch: int = 1,
    progress: bool | None = None,
) -> TextScore:
    """As `score_text`, of tokens that stand for `size` bytes."""
    overlap = context // 4 if overlap is None else overlap
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens; at least two are wanted")
    if context < 2 or not 0 <= overlap < context - 1 or batch < 1:
        raise InputError(
            f"context={context}, overlap={overlap}, batch={batch}: a context of at least 2, an "
            "overlap below context - 1 and a batch of at least 1 are wanted"
        )
    tokens = torch.tensor(ids, dtype=torch.long)
    calls = list(_calls(len(ids), context, overlap, batch))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    nats = 0.0
    with evaluating(model):
        for spans in track(calls, len(calls), "eval", progress):
            windows = torch.stack([tokens[start:stop] for start, stop, _ in spans]).to(device)
            losses = _losses(logits_of(model(windows)), windows)
            nats += sum(
                float(row[first - start - 1 :].sum(dtype=torch.float64))
                for row, (start, _, first) in zip(losses, spans, strict=True)
            )
    return TextScore(nats, len(ids) - 1, size)


def _losses(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """-ln p of tokens 1 ... T - 1 of every window, [B, T - 1]."""
    flat = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(windows), -1)


_Span = tuple[int, int, int]
"""(first token of the window, end of the window, first token that it is scored on)."""


def _calls(count: int, context: int, overlap: int, batch: int) -> Iterator[list[_Span]]:
    """Windows over `count` tokens, those of one length together, at most `batch` a call."""
    held: list[_Span] = []
    first = 1
    while first < count:
        start = max(0, first - max(overlap, 1))
        stop = min(start + context, count)
        if held and (stop - start != held[0][1] - held[0][0] or len(held) == batch):
            yield held
            held = []
        held.append((start, stop, first))
        first = stop
    if held:
        yield held
