"""`ternc generate MODEL_DIR --prompt TEXT`: a language model on disk continues a prompt."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ternc.cli.console import add_device_option, add_json_option, counted, print_json, say
from ternc.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc generate`."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="written by ternc, or float")
    add("--prompt", required=True, help="text to continue")
    add("--tokens", type=int, default=64, help="new tokens at most (64)")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--seed", type=int, default=0, help="of the draws, where the temperature is not 0")
    add_device_option(parser, "best")
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Generate with the model's own cache; print prompt and continuation."""
    from ternc.cli.huggingface import load_folder, tokenizer_of

    if namespace.tokens < 1 or namespace.temperature < 0:
        raise InputError(
            f"tokens={namespace.tokens}, temperature={namespace.temperature:g}: at least 1 token, "
            "and no negative temperature"
        )
    say(f"loading {namespace.model}")
    model: Any = load_folder(namespace.model).to(namespace.device)
    if not callable(can := getattr(model, "can_generate", None)) or not can():
        raise InputError(
            f"{type(model).__name__} generates no text; give the folder of a language model"
        )
    tokenizer = tokenizer_of(namespace.model)
    ids = _encode(namespace.prompt, tokenizer).to(namespace.device)
    say(f"{counted(ids.shape[1], 'token')} of prompt, at most {namespace.tokens} more")
    start = time.perf_counter()
    new = _continue(model, ids, namespace)
    seconds = time.perf_counter() - start
    result = {
        "prompt": namespace.prompt,
        "text": _decode(new, tokenizer),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
    }
    if namespace.json:
        print_json(result)
    else:
        print(namespace.prompt + result["text"])
        rate = f"{len(new) / seconds:.1f} tokens/s, prompt included"
        say(f"{counted(len(new), 'token')} in {seconds:.2f} s: {rate}")
    return 0


def _continue(model: Any, ids: torch.Tensor, namespace: argparse.Namespace) -> list[int]:
    """New token ids for a prompt int64 [1, T]; keys and values of past tokens are kept.

    Raises:
        InputError: prompt and new tokens are more than the model has positions.
    """
    known = getattr(model.config, "max_position_embeddings", None)
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    longest = max(ids.shape[1], namespace.tokens) if encoder else ids.shape[1] + namespace.tokens
    if isinstance(known, int) and longest > known:
        raise InputError(
            f"{ids.shape[1]} tokens of prompt and {namespace.tokens} new ones: the model has "
            f"{known} positions; give a shorter --prompt or a smaller --tokens"
        )
    torch.manual_seed(namespace.seed)
    options: dict[str, Any] = {"do_sample": False}
    if namespace.temperature > 0:
        # The whole distribution: a folder's own cuts are not what was asked for.
        options = {"do_sample": True, "temperature": namespace.temperature, "top_k": 0}
        options["top_p"] = 1.0
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0  # one sequence has no padding, but transformers asks
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=namespace.tokens,
            use_cache=True,
            **options,
        )
    return output[0, 1 if encoder else ids.shape[1] :].tolist()


def _encode(text: str, tokenizer: Any) -> torch.Tensor:
    """Token ids int64 [1, T]; bytes where there is no tokenizer.

    Raises:
        InputError: the text is empty.
    """
    ids = list(text.encode()) if tokenizer is None else tokenizer(text).input_ids
    if not ids:
        raise InputError("--prompt is empty: a model continues at least one token")
    return torch.tensor([ids])


def _decode(ids: list[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return bytes(token % 256 for token in ids).decode("utf-8", errors="replace")
    return tokenizer.decode(ids, skip_special_tokens=True)
