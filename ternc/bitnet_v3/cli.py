"""`bitnet-v3-train`, `bitnet-v3-infer`: text -> a byte-level BitNet v3 model -> text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ternc.errors import InputError, TerncError

BYTES = 256


def train(arguments: Sequence[str] | None = None) -> int:
    """Command line of `bitnet-v3-train`."""
    parser = argparse.ArgumentParser(prog="bitnet-v3-train", description="Train on a text's bytes.")
    add = parser.add_argument
    add("--text", type=Path, required=True, help="text file; tokens are its bytes")
    add("--output-dir", "-o", type=Path, required=True, help="folder of save_pretrained")
    add("--hidden-size", type=int, default=256)
    add("--num-layers", type=int, default=4)
    add("--num-heads", type=int, default=4)
    add("--context", type=int, default=256, help="bytes of a sequence")
    add("--num-epochs", type=int, default=70)
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    return _guarded(_train, parser.parse_args(arguments))


def infer(arguments: Sequence[str] | None = None) -> int:
    """Command line of `bitnet-v3-infer`."""
    parser = argparse.ArgumentParser(prog="bitnet-v3-infer", description="Continue a prompt.")
    add = parser.add_argument
    add("model", type=Path, help="folder that bitnet-v3-train wrote")
    add("--prompt", required=True)
    add("--max-length", type=int, default=100, help="bytes, those of the prompt included")
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest byte")
    add("--seed", type=int, default=0)
    return _guarded(_infer, parser.parse_args(arguments))


def _train(namespace: argparse.Namespace) -> None:
    import ternc
    from ternc.bitnet_v3.models import create_model
    from ternc.bitnet_v3.training import create_trainer

    body = torch.frombuffer(bytearray(namespace.text.read_bytes()), dtype=torch.uint8).long()
    count = len(body) // namespace.context
    if not count:
        raise InputError(f"{namespace.text} is shorter than --context {namespace.context}")
    windows = body[: count * namespace.context].view(count, namespace.context)
    torch.manual_seed(namespace.seed)
    model = create_model(
        BYTES,
        namespace.hidden_size,
        namespace.num_layers,
        namespace.num_heads,
        knowledge_distillation=False,
        max_position_embeddings=namespace.context,
    )
    trainer = create_trainer(
        model,
        namespace.learning_rate,
        namespace.batch_size,
        enable_gakd=False,
        progress=True,
    )
    order = torch.Generator().manual_seed(namespace.seed)
    loader: Any = torch.utils.data.DataLoader(
        windows,  # type: ignore[arg-type]
        min(namespace.batch_size, count),
        shuffle=True,
        generator=order,
    )
    trainer.train(loader, num_epochs=namespace.num_epochs)
    ternc.quantize(model.eval(), inplace=True).save_pretrained(namespace.output_dir)  # type: ignore[operator]
    print(f"wrote {namespace.output_dir}")


def _infer(namespace: argparse.Namespace) -> None:
    from ternc.bitnet_v3.models import BitNetV3Model

    prompt = namespace.prompt.encode()
    if not prompt:
        raise InputError("--prompt is empty: a model continues at least one byte")
    model = BitNetV3Model.from_pretrained(namespace.model)
    torch.manual_seed(namespace.seed)
    ids = model.generate(
        torch.tensor([list(prompt)]),
        max_length=namespace.max_length,
        temperature=namespace.temperature or 1.0,
        do_sample=namespace.temperature > 0,
    )
    print(bytes(ids[0].tolist()).decode("utf-8", errors="replace"))


def _guarded(action: Callable[[argparse.Namespace], None], namespace: argparse.Namespace) -> int:
    """Errors in one line, exit status 1."""
    try:
        action(namespace)
    except (TerncError, OSError) as error:
        print(f"bitnet-v3: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
