"""A Hugging Face folder on disk <-> model, example inputs, side files. Never asks the network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ternc.cli.console import say
from ternc.errors import (
    CheckpointError,
    InputError,
    MissingExtraError,
    UnsupportedModelError,
)
from ternc.pretrained import mapped

SIDE_FILES = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "*.model")
"""What a model folder holds beside the weights, as globs."""


_UNNAMED = "AutoModel"
"""Takes the class from config.json's model type."""


def load_model(folder: Path) -> torch.nn.Module:
    """The model of the class that `config.json` names, in evaluation mode; weights mapped if it can
    be: a model larger than memory is then quantised file by file.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the folder holds no readable config.json or no weights, or packed ones.
        UnsupportedModelError: the installed transformers does not know the class.
    """
    if is_packed(folder):
        raise CheckpointError(
            f"{folder}: its weights are packed already, by ternc; give the folder of the "
            "floating-point model"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "reading a Hugging Face folder") from error
    name = architecture(folder)
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} has no class {name!r}, which "
            "config.json asks for; install a version that has it"
        )
    if name != _UNNAMED and (streamed := mapped(name, folder)) is not None:
        return streamed
    try:
        model = model_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the class makes of these files
        raise CheckpointError(f"{folder}: cannot be loaded as {name}: {error}") from error
    return model.eval()


def load_folder(folder: Path) -> torch.nn.Module:
    """The model of a folder: packed where `ternc.save` wrote it, else as `load_model` does.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    import ternc

    return ternc.load(folder) if is_packed(folder) else load_model(folder)


def refuse_overwriting(model: Path, output: Path) -> None:
    """Raises InputError where the packed model would take the place of the floating-point one."""
    if model.resolve() == output.resolve():
        raise InputError(
            f"{output} is the folder of the model itself, whose weights would be lost; "
            "give another one to write to"
        )


def random_model(folder: Path) -> torch.nn.Module:
    """A model of the folder's class and config.json with random floating-point weights.

    Raises:
        CheckpointError: config.json does not describe a class of transformers.
    """
    import transformers

    model_class: Any = getattr(transformers, architecture(folder), None)
    if model_class is None or not hasattr(model_class, "config_class"):
        raise CheckpointError(f"{folder}: config.json names no class of transformers")
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    return model_class(config).eval()


def is_packed(folder: Path) -> bool:
    """Whether `ternc.save` wrote the folder."""
    from ternc.checkpoint import MANIFEST

    return (folder / MANIFEST).is_file()


def tokenizer_of(*folders: Path | None) -> Any:
    """The tokenizer of the first folder that has one; None where none has: tokens are bytes.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "reading a tokenizer") from error
    for folder in folders:
        if folder is not None and any(folder.glob("token*")):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return None


def has_logits(model: torch.nn.Module) -> bool:
    """Whether the model has a head over its vocabulary, as transformers tells."""
    head = getattr(model, "get_output_embeddings", None)
    return callable(head) and head() is not None


def within_positions(model: torch.nn.Module, context: int) -> int:
    """`context`, or as many tokens as the model has positions; says so where it has fewer."""
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(known, int) or context <= known:
        return context
    say(f"windows of {known} tokens, not {context}: the model has no more positions")
    return known


def text_batches(
    model: torch.nn.Module, tokenizer: Any, text: str, sequences: int, context: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of a text to calibrate a model on: windows, or its lines where it is an encoder.

    Args:
        tokenizer: None where tokens are bytes.
        sequences: at most so many, evenly spaced over the text.
        context: tokens of one at most, and no more than the model has positions.

    Raises:
        InputError: the text is too short, or an encoder has no tokenizer.
    """
    context = within_positions(model, context)
    if context < 1 or sequences < 1:
        raise InputError(f"sequences={sequences}, context={context}: at least 1 of each is wanted")
    if not has_logits(model):
        return _line_batches(tokenizer, text, sequences, context)
    ids = list(text.encode()) if tokenizer is None else tokenizer(text).input_ids
    count = min(sequences, len(ids) // context)
    if not count:
        raise InputError(f"the text has {len(ids)} tokens; {context} make one sequence")
    last = len(ids) - context
    starts = [index * last // max(count - 1, 1) for index in range(count)]
    windows = torch.tensor([ids[start : start + context] for start in starts])
    return [{"input_ids": part} for part in windows.split(_BATCH)]


def _line_batches(
    tokenizer: Any, text: str, sequences: int, context: int
) -> list[dict[str, torch.Tensor]]:
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if tokenizer is None or not lines:
        raise InputError("an encoder is calibrated on the lines of a text, by its tokenizer")
    lines = lines[:: max(1, len(lines) // sequences)][:sequences]
    return [
        dict(
            tokenizer(
                lines[start : start + _BATCH],
                padding=True,
                truncation=True,
                max_length=context,
                return_tensors="pt",
            )
        )
        for start in range(0, len(lines), _BATCH)
    ]


_BATCH = 8
"""Sequences of a batch: one batch in eight is kept for judging the fits."""


def architecture(folder: Path) -> str:
    """Class named by `config.json`, `_UNNAMED` when it names none.

    Raises:
        CheckpointError: the file is missing, no JSON object, or names something else.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable config.json ({error})") from error
    named = (config.get("architectures") or [_UNNAMED]) if isinstance(config, dict) else None
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise CheckpointError(f"{path} is no configuration of a model: see its 'architectures'")
    return named[0]


def example_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """Small inputs that the model's forward accepts, as it declares them itself.

    Raises:
        UnsupportedModelError: its main input is neither token ids nor an image.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        declared: Any = model.dummy_inputs
        inputs = dict(declared)
        if getattr(config, "is_encoder_decoder", False):
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
        return inputs
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.zeros(1, config.num_channels, height, width)}
    raise UnsupportedModelError(
        f"{type(model).__name__} takes {main!r}; use ternc.explain(model, inputs) from Python"
    )


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy configuration and tokenizer files that `target` does not have; returns their names."""
    copied = []
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
                copied.append(path.name)
    return copied
