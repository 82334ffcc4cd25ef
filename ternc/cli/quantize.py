"""`ternc quantize MODEL_DIR -o OUT`: float weights in, packed ternary weights out (safetensors)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternc.cli.console import (
    add_config_options,
    add_device_option,
    add_json_option,
    config_of,
    print_json,
    say,
    text_file,
)
from ternc.cli.options import add_options, given, settings_of
from ternc.config import Config
from ternc.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc quantize`."""
    from ternc.calibration.reconstruct import Reconstruction
    from ternc.calibration.tune import Tuning

    add = parser.add_argument
    add("model", type=Path, metavar="HF_MODEL_DIR", help="folder with config.json")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to write")
    add(
        "--calibration",
        type=text_file,
        metavar="FILE",
        help="UTF-8 text: fit every layer to the inputs that it gets on it",
    )
    add("--sequences", type=int, default=128, help="of the text, evenly spaced (default: 128)")
    add("--context", type=int, default=512, help="tokens of a sequence at most (default: 512)")
    add(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keep fitted layers here; go on if some are there",
    )
    add_device_option(parser, why="where layers are fitted")
    add(
        "--tuning",
        action="store_true",
        help="train scales, norms and biases against the float model; so does any --tuning-...",
    )
    add(
        "--reconstruction",
        action="store_true",
        help="before that, train the codes too; so does any --reconstruction-...",
    )
    add_json_option(parser)
    add_config_options(parser)
    add_options(parser, Tuning, "tuning")
    add_options(parser, Reconstruction, "reconstruction")


def run(namespace: argparse.Namespace) -> int:
    """Write the folder, then print the report."""
    import ternc
    from ternc.cli.huggingface import (
        copy_side_files,
        example_inputs,
        load_model,
        refuse_overwriting,
        text_batches,
        tokenizer_of,
    )

    config, training = config_of(namespace), _training(namespace)
    _refuse_uncalibrated(namespace, config, training)
    refuse_overwriting(namespace.model, namespace.output)
    say(f"loading {namespace.model}")
    model = load_model(namespace.model).to(namespace.device)
    batches = None
    if namespace.calibration is not None:
        text = namespace.calibration.read_bytes().decode("utf-8", errors="ignore")
        tokenizer = tokenizer_of(namespace.model)
        found = text_batches(model, tokenizer, text, namespace.sequences, namespace.context)
        batches = [_moved(batch, namespace.device) for batch in found]
    # The graph of a call says which rotations can be folded into float weights.
    inputs = _moved(example_inputs(model), namespace.device) if _folds(config) else None
    say("quantizing")
    quantized = ternc.quantize(
        model, config, example_inputs=inputs, calibration=batches, resume=namespace.resume,
        inplace=not training, **training,
    )  # fmt: skip
    ternc.save(quantized, namespace.output)
    copied = copy_side_files(namespace.model, namespace.output)
    say(f"wrote {namespace.output}" + (f" (with {', '.join(copied)})" if copied else ""))
    report = ternc.report(quantized)
    if namespace.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 0


def _refuse_uncalibrated(
    namespace: argparse.Namespace, config: Config, training: Mapping[str, Any]
) -> None:
    """Raises ConfigError, before the model is loaded, for what needs a text and has none."""
    asked = {
        "--bits-budget": config.bits_budget is not None,
        "--method gptq": config.method == "gptq",
        "--resume": namespace.resume is not None,
        **{f"--{name}": True for name in training},
    }
    if namespace.calibration is None and any(asked.values()):
        first = next(flag for flag, set_ in asked.items() if set_)
        raise ConfigError(f"{first} needs a text to fit the layers to: give --calibration FILE")


def _training(namespace: argparse.Namespace) -> dict[str, Any]:
    """`tuning` and `reconstruction` of `ternc.quantize`, where they are asked for."""
    from ternc.calibration.reconstruct import Reconstruction
    from ternc.calibration.tune import Tuning

    kinds = {"tuning": Tuning, "reconstruction": Reconstruction}
    return {
        name: settings_of(namespace, cls)
        for name, cls in kinds.items()
        if getattr(namespace, name) or given(namespace, cls)
    }


def _folds(config: Any) -> bool:
    return config.rotation == "hadamard"


def _moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}
