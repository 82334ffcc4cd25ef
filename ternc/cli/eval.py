"""`ternc eval MODEL_DIR`: bits per byte of --text, agreement with --against, lm-eval's --task."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ternc.cli.console import add_device_option, add_json_option, print_json, say, text_file
from ternc.cli.huggingface import has_logits, load_folder, tokenizer_of, within_positions
from ternc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc eval`."""
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="written by ternc, or float")
    add = parser.add_argument
    add("--text", type=text_file, help="UTF-8 text file to score")
    add("--against", type=Path, metavar="FLOAT_DIR", help="compare with this (float) model")
    add("--limit", type=int, metavar="BYTES", help="read so much of the text only")
    add("--task", action="append", default=[], metavar="NAME", help="of lm-eval; may be repeated")
    add("--task-folder", type=Path, metavar="DIR", help="more tasks, as lm-eval writes them")
    add("--examples", type=int, metavar="N", help="of each task at most (default: all)")
    add("--few-shot", type=int, metavar="N", help="examples before each question of a task")
    add("--context", type=int, default=512, help="tokens of a window (default: 512)")
    add_device_option(parser)
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Score the model, print the numbers."""
    if namespace.text is None and not namespace.task:
        raise InputError("nothing to score: give --text FILE or --task NAME")
    say(f"loading {namespace.model}")
    model = load_folder(namespace.model).to(namespace.device)
    reference = None
    if namespace.against is not None:
        reference = load_folder(namespace.against).to(namespace.device)
    tokenizer = tokenizer_of(namespace.model, namespace.against)
    namespace.context = within_positions(model, namespace.context)
    result: dict[str, Any] = {}
    if namespace.text is not None:
        result = _score_text(model, reference, tokenizer, namespace)
    if namespace.task:
        result["tasks"] = _score_tasks(model, tokenizer, namespace)
    if namespace.json:
        print_json(result)
    else:
        for name, value in _flat(result):
            print(f"{name:15} {value:,.4f}" if isinstance(value, float) else f"{name:15} {value:,}")
    return 0


def _flat(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of nested results, names joined by spaces."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from ((f"{name} {inner}".removeprefix("tasks "), v) for inner, v in _flat(value))
        else:
            yield name, value


def _score_text(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    tokenizer: Any,
    namespace: argparse.Namespace,
) -> dict[str, Any]:
    text = namespace.text.read_bytes()[: namespace.limit].decode("utf-8", errors="ignore")
    if has_logits(model):
        return _score_language(model, reference, text, tokenizer, namespace)
    if reference is not None:
        return _score_encoder(model, reference, text, tokenizer, namespace)
    raise InputError(
        f"{type(model).__name__} predicts no text: its embeddings can only be compared with "
        "another model's; give --against FLOAT_DIR"
    )


def _score_tasks(
    model: torch.nn.Module, tokenizer: Any, namespace: argparse.Namespace
) -> dict[str, dict[str, float]]:
    from ternc.eval import score_tasks

    return score_tasks(
        model, namespace.task, encode=_encoder(tokenizer),
        decode=None if tokenizer is None else tokenizer.decode, folder=namespace.task_folder,
        context=namespace.context, limit=namespace.examples, few_shot=namespace.few_shot,
    )  # fmt: skip


def _encoder(tokenizer: Any) -> Callable[[str], Sequence[int]] | None:
    """Text -> token ids; None where tokens are bytes."""
    if tokenizer is None:
        return None
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def _score_language(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    text: str,
    tokenizer: Any,
    namespace: argparse.Namespace,
) -> dict[str, float]:
    from ternc.eval import compare_logits, score_text

    encode, context = _encoder(tokenizer), namespace.context
    result: dict[str, float] = dict(score_text(model, text, encode, context=context).to_dict())
    if reference is not None:
        ids = list(text.encode() if encode is None else encode(text))
        windows = (part.to(namespace.device) for part in _windows(ids, context))
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
    namespace: argparse.Namespace,
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
                max_length=namespace.context,
                return_tensors="pt",
            ).to(namespace.device)
        )
        for start in range(0, len(lines), 32)
    )
    return dataclasses.asdict(compare_embeddings(model, reference, batches))
