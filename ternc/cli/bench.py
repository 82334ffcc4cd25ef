"""`ternc bench MODEL_DIR` or `--layer IN OUT`: one forward, floating point beside ternc.

    float      the floating-point module, eager
    inductor   the same under torch.compile
    packed     the packed module, eager
    ternc      the packed module under torch.compile(backend="ternc")

All of them in one run, in turn, so that a slow spell of the machine hits each. A compiled form is
compared with the eager form of its own weights: a fast wrong answer would show.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.cli.console import (
    add_config_options,
    add_device_option,
    add_json_option,
    config_of,
    counted,
    print_json,
    say,
)
from ternc.config import Config
from ternc.errors import InputError

ROTATED = 192 << 20
"""Bytes of weight that the calls on a layer go round, so that none is read from a cache."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ternc bench`."""
    subject = parser.add_mutually_exclusive_group(required=True).add_argument
    subject("model", type=Path, nargs="?", metavar="MODEL_DIR", help="written by ternc, or float")
    subject("--layer", type=int, nargs=2, metavar=("IN", "OUT"), help="a linear layer instead")
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[1, 256], help="of a forward (1 256); no cache")
    add("--rounds", type=int, default=15, help="samples of each form; the median counts (15)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved, float32")
    add(
        "--inner",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what runs the rest of the rewritten graph; other than inductor, its row is left out",
    )
    add_device_option(parser, "best")
    add_config_options(parser)
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    """Time every form at every number of tokens; print the table."""
    if namespace.rounds < 1 or min(namespace.tokens) < 1 or min(namespace.layer or [1]) < 1:
        raise InputError("--rounds, --tokens and --layer take positive numbers")
    subject = _layer(namespace) if namespace.layer else _model(namespace)
    counts = namespace.tokens if subject.takes_tokens else [None]
    rows = [row for count in counts for row in _measure(subject, count, namespace)]
    result = {
        "subject": subject.name,
        "note": subject.note,
        "device": _device(namespace.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": namespace.rounds,
        "bytes": {name: _bytes(forms[0]) for name, forms in subject.forms.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if namespace.json:
        print_json(result)
    else:
        print(_table(result, rows))
    return 0


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass
class Subject:
    """What is timed."""

    name: str
    note: str
    forms: dict[str, list[nn.Module]]
    """"float" and "packed": copies to be called in turn."""
    inputs: Callable[[Any], Inputs]
    """Tokens, or None -> the arguments of a forward."""
    takes_tokens: bool = True


@dataclasses.dataclass
class Row:
    """One form at one number of tokens."""

    tokens: int | None
    """None: the model takes something else."""
    form: str
    milliseconds: float
    speed: float
    """Against the floating-point eager form."""
    difference: float | None
    """Relative distance of the output to that of the same weights run eagerly."""
    kernels: list[str]


def _layer(namespace: argparse.Namespace) -> Subject:
    """One linear layer, in as many copies as outgrow the caches."""
    import ternc

    width, out = namespace.layer
    torch.manual_seed(0)
    dtype = getattr(torch, namespace.dtype or "float32")
    layer = nn.Linear(width, out, device=namespace.device, dtype=dtype).eval().requires_grad_(False)
    packed = ternc.quantize(layer, config_of(namespace))
    forms = {"float": _copies(layer), "packed": _copies(packed)}
    note = f"random weights; {', '.join(f'{len(v)} {k} copies' for k, v in forms.items())} in turn"

    def inputs(tokens: int) -> Inputs:
        return (torch.randn(tokens, width, device=namespace.device, dtype=dtype),), {}

    return Subject(f"linear {width} -> {out}", note + _unpacked(packed), forms, inputs)


def _copies(module: nn.Module) -> list[nn.Module]:
    count = max(2, -(-ROTATED // _bytes(module)))
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def _model(namespace: argparse.Namespace) -> Subject:
    """A folder's model, packed here if it is float; its float form, of random weights if not.

    Raises:
        InputError: a configuration is given for a folder that is packed already.
    """
    import ternc
    from ternc.cli.huggingface import is_packed, load_folder, random_model

    config = config_of(namespace)
    say(f"loading {namespace.model}")
    found = load_folder(namespace.model)
    if is_packed(namespace.model):
        if config != Config():
            raise InputError(
                f"{namespace.model} is packed: --planes and the like are for float folders"
            )
        packed, dense = found, random_model(namespace.model)
        note = "float: the same class with random weights"
    else:
        say("quantizing")
        dense, packed = found, ternc.quantize(found, config)
        note = "packed here"
    dtype: Any = getattr(torch, namespace.dtype) if namespace.dtype else found.dtype
    forms = {
        name: [form.to(namespace.device, dtype).eval().requires_grad_(False)]
        for name, form in (("float", dense), ("packed", packed))
    }
    inputs = functools.partial(_model_inputs, dense, namespace.device, dtype)
    takes_tokens = getattr(dense, "main_input_name", "input_ids") == "input_ids"
    name, note = type(found).__name__, f"{note}, {dtype}" + _unpacked(packed)
    return Subject(name, note, forms, inputs, takes_tokens)


def _model_inputs(model: Any, device: str, dtype: Any, tokens: int | None) -> Inputs:
    """Arguments of a forward of one sequence, in the model's own names.

    Raises:
        InputError: more tokens than the model has positions.
    """
    from ternc.cli.huggingface import example_inputs

    known = getattr(model.config, "max_position_embeddings", None)
    if isinstance(known, int) and tokens is not None and tokens > known:
        raise InputError(f"--tokens {tokens}: the model has {known} positions")
    torch.manual_seed(0)
    made = dict(example_inputs(model))
    for name, value in made.items():
        if name.endswith("input_ids") and tokens is not None:
            made[name] = torch.randint(model.config.vocab_size, (1, tokens), device=device)
        elif isinstance(value, torch.Tensor):
            made[name] = value.to(device, dtype if value.is_floating_point() else None)
    if "input_ids" in made:
        made = {name: value for name, value in made.items() if name.endswith("input_ids")}
        if "use_cache" in inspect.signature(model.forward).parameters:
            made["use_cache"] = False
    return (), made


def _measure(subject: Subject, tokens: int | None, namespace: argparse.Namespace) -> Iterator[Row]:
    """Compile, compare, then time in turn."""
    from ternc.backend import ternc_backend
    from ternc.demo.measure import interleaved_medians

    what = subject.name if tokens is None else f"{subject.name}, {counted(tokens, 'token')}"
    say(f"{what}: compiling")
    torch._dynamo.reset()
    forms = dict(subject.forms)
    if namespace.inner == "inductor":
        forms["inductor"] = [_compiled(form) for form in forms["float"]]
    options = {"inner": namespace.inner}
    backend = functools.partial(ternc_backend, options=options)
    forms["ternc"] = [_compiled(form, backend) for form in forms["packed"]]
    args, kwargs = inputs = subject.inputs(tokens)
    difference: dict[str, float] = {}
    kernels: dict[str, list[str]] = {}
    with torch.inference_mode():
        for name, eager in (("inductor", "float"), ("ternc", "packed")):
            if name in forms:
                expected = _output(forms[eager][0](*args, **kwargs))
                difference[name] = _distance(_output(forms[name][0](*args, **kwargs)), expected)
        for name in ("packed", "ternc"):
            kernels[name] = _kernels(subject.forms["packed"][0], forms[name][0], inputs)
        say(f"{what}: timing")
        calls = {name: _call(copies, inputs, namespace.device) for name, copies in forms.items()}
        # Every copy is warm: compiled code is shared, what is made on first use is not.
        warm_up = max(3, *(len(copies) for copies in forms.values()))
        medians = interleaved_medians(calls, namespace.rounds, warm_up)
    for name in ("float", "inductor", "packed", "ternc"):
        if name in medians:
            seconds, ratio = medians[name], medians["float"] / medians[name]
            yield Row(
                tokens, name, 1e3 * seconds, ratio, difference.get(name), kernels.get(name, [])
            )


def _compiled(module: nn.Module, backend: Any = "inductor") -> Any:
    return torch.compile(module, backend=backend, dynamic=False)


def _call(copies: list[Any], inputs: Inputs, device: str) -> Callable[[], None]:
    """Calls the copies in turn; returns when the device is done."""
    args, kwargs = inputs
    turn = itertools.cycle(copies)

    def call() -> None:
        next(turn)(*args, **kwargs)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return call


def _kernels(packed: nn.Module, form: Any, inputs: Inputs) -> list[str]:
    """What the last call of a form ran, of the layers that are packed."""
    import ternc

    form(*inputs[0], **inputs[1])
    rows = ternc.report(packed if form is packed else form).rewritten
    return sorted({row.kernel for row in rows if row.kernel and row.shape})


def _unpacked(packed: nn.Module) -> str:
    """A remark on layers that stayed floating point."""
    import ternc

    report = ternc.report(packed)
    rows = [row for row in (*report.rewritten, *report.skipped) if row.shape]
    left = [row for row in rows if row.action == "skipped"]
    return f"; {len(left)} of {len(rows)} weights stay floating point" if left else ""


def _output(value: Any) -> torch.Tensor:
    """The first tensor that a forward returned."""
    if isinstance(value, torch.Tensor):
        return value
    return next(v for v in tuple(value.values()) if isinstance(v, torch.Tensor))


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _bytes(module: nn.Module) -> int:
    """Resident bytes of parameters and buffers, shared memory once."""
    held = {t.untyped_storage().data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _device(name: str) -> str:
    return torch.cuda.get_device_name() if name.startswith("cuda") else name


def _table(result: dict[str, Any], rows: list[Row]) -> str:
    import tabulate

    from ternc.reporting import format_bytes

    lines = [
        (
            "-" if row.tokens is None else row.tokens,
            row.form,
            f"{row.milliseconds:.3f}",
            f"{row.speed:.2f}",
            "" if row.difference is None else f"{row.difference:.1e}",
            ", ".join(row.kernels),
        )
        for row in rows
    ]
    headers = ("tokens", "form", "ms", "x float", "difference", "kernels")
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in result["bytes"].items())
    return "\n\n".join(
        (
            f"{result['subject']}: {sizes}; {result['note']}.",
            tabulate.tabulate(lines, headers, tablefmt="simple", disable_numparse=True),
            f"Median of {result['rounds']} calls of each form in turn; {result['device']}, "
            f"{counted(result['threads'], 'thread')}, torch {result['torch']}. Difference: of "
            "the output to that of the same weights run eagerly.",
        )
    )
