"""`ternc eval MODEL_DIR --text FILE`: perplexity, bits per byte; with --against, agreement."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ternc.cli.console import add_json_option, print_json, say
from ternc.cli.huggingface import has_logits, load_folder, tokenizer_of
from ternc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc eval`."""
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="written by ternc, or float")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument(
        "--against", type=Path, metavar="FLOAT_DIR", help="compare with this (float) model"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (default 512)")
    parser.add_argument("--limit", type=int, metavar="BYTES", help="read so much of the text only")
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Score the model, print the numbers."""
    text = namespace.text.read_bytes()[: namespace.limit].decode("utf-8", errors="ignore")
    say(f"loading {namespace.model}")
    model = load_folder(namespace.model)
    reference = None if namespace.against is None else load_folder(namespace.against)
    tokenizer = tokenizer_of(namespace.model, namespace.against)
    if has_logits(model):
        result = _score_language(model, reference, text, tokenizer, namespace.context)
    elif reference is not None:
        result = _score_encoder(model, reference, text, tokenizer, namespace.context)
    else:
        raise InputError(
            f"{type(model).__name__} predicts no text: its embeddings can only be compared with "
            "another model's; give --against FLOAT_DIR"
        )
    if namespace.json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name:15} {value:,.4f}" if isinstance(value, float) else f"{name:15} {value:,}")
    return 0


def _score_language(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    text: str,
    tokenizer: Any,
    context: int,
) -> dict[str, float]:
    from ternc.eval import compare_logits, score_text

    encode: Callable[[str], Sequence[int]] | None = None
    if tokenizer is not None:
        encode = lambda line: tokenizer(line, add_special_tokens=False).input_ids  # noqa: E731
    result: dict[str, float] = dict(score_text(model, text, encode, context=context).to_dict())
    if reference is not None:
        ids = list(text.encode() if encode is None else encode(text))
        windows = _windows(ids, context)
        result |= dataclasses.asdict(compare_logits(model, reference, windows))
    return result


def _windows(ids: list[int], context: int) -> Iterator[torch.Tensor]:
    """Token ids [1, T], window after window."""
    for start in range(0, len(ids), context):
        yield torch.tensor([ids[start : start + context]])


def _score_encoder(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    text: str,
    tokenizer: Any,
    context: int,
) -> dict[str, float]:
    """Every line of the text is a sentence."""
    from ternc.eval import compare_embeddings

    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if tokenizer is None:
        raise InputError("the model folder holds no tokenizer, and an encoder needs one")
    batches = (
        dict(
            tokenizer(
                lines[start : start + 32],
                padding=True,
                truncation=True,
                max_length=context,
                return_tensors="pt",
            )
        )
        for start in range(0, len(lines), 32)
    )
    return dataclasses.asdict(compare_embeddings(model, reference, batches))
