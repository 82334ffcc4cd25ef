"""quantize(model) -> the same model with its Linears packed: offline rewriting.

find linears, attention and, on request, embeddings -> decide by value, name and error ->
put packed modules in their place

The root keeps its class and its forward, so `generate`, hooks and state_dict go on working.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ternc.calibration.batches import check_call
from ternc.calibration.calibrator import Calibrator, Layer
from ternc.calibration.distance import Loss
from ternc.calibration.reconstruct import Reconstruction
from ternc.calibration.session import Session
from ternc.calibration.tune import Tuning
from ternc.config import Config, checked_config
from ternc.errors import ConfigError, UnsupportedModelError
from ternc.folding import Folding, fold
from ternc.module_sites import ModuleSite, Ties, survey
from ternc.modules.conversion import (
    EMBEDDING,
    Converted,
    convert_attention,
    convert_linear,
    convert_tied,
    is_attention,
    packed_row,
    skipped_row,
    switch_off_fast_paths,
    why_not,
)
from ternc.modules.linear import TernaryLinear, describe
from ternc.policy import refuse_offline
from ternc.progress import track
from ternc.reporting import Row
from ternc.runtime import ops
from ternc.runtime.dynamo import uncompiled
from ternc.stacks import stacked_rows
from ternc.train.linear import QATLinear
from ternc.uncalled import mark_uncalled


def quantize(
    model: nn.Module,
    config: Config | None = None,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    tuning: Tuning | None = None,
    reconstruction: Reconstruction | None = None,
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """A model whose linear layers hold packed ternary weights; `ternc.report` says what was done.

    nn.Linear and transposed linears become TernaryLinear, nn.MultiheadAttention becomes
    TernaryMultiheadAttention. An nn.Embedding that `config.int8` or `config.include` names becomes
    TernaryEmbedding; what `config.int8` names holds int8 codes, under all names that a tied weight
    has. Another weight that already is ternary is held exactly; the others are fitted within
    `config.error_budget`, or stay floating point with a reason in the report. Tied
    weights stay tied, modes, hooks and devices stay what they are. Codes are fitted one layer at a
    time: with `inplace=True` each float weight is let go of as its packed form appears, so that
    the peak is the float model and the temporaries of one layer; otherwise a copy of the whole
    float model comes on top.

    Args:
        model: any module, a Linear itself included. Of a compiled one the model inside is taken,
            and returned: compile it anew.
        config: default `Config()`.
        example_inputs: a tuple of arguments (or a mapping of keyword arguments, or one tensor). The
            finished model is run on them once, without gradients and in eval mode; a packed layer
            that was not called then says so in its report row. With `rotation="hadamard"` the graph
            of that call says which rotations are folded into float weights beforehand.
        calibration: batches of model inputs (each as `example_inputs` may be). Layers are then
            fitted in the order in which the model calls them, to the inputs that the already
            quantised layers before them give; one batch in eight is kept for judging the fits.
        loss: (output of the quantised model, of the float model, batch) -> scalar; default: KL of
            logits, else one minus the cosine of the outputs. `bits_budget` and `tuning` lower it.
        tuning: train scales, norms and biases against the float model afterwards.
        reconstruction: before that, train the codes too, of the whole model or block by block.
            Takes minutes on a GPU; most worth while at one plane.
        resume: a folder. Fitted layers are kept there; a run that finds some goes on after them,
            with the same result. Delete it when the model is saved.
        inplace: replace the modules of `model` itself. A root that is a Linear cannot be replaced
            in place: use the returned module.
        progress: show progress on stderr; None shows it on a terminal.

    Raises:
        ConfigError: a setting that cannot be obeyed like this; the message names another.
        InputError: the calibration data are empty or hold no tensors; a batch or the example inputs
            are not what the model's forward takes.
        CheckpointError: the `resume` folder is damaged or of another run.
        UnsupportedModelError: `model` is not a module, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"quantize: a torch.nn.Module, not a {type(model).__name__}")
    model = uncompiled(model)
    config = checked_config(config)
    refuse_offline(config, calibration is not None)
    ops.register()
    session = Session.of(config, calibration, loss, tuning, reconstruction, resume, progress)
    if session is not None and inplace and session.needs_teacher:
        raise ConfigError(
            f"{session.needs_teacher} needs the float model beside the quantised one: inplace=False"
        )
    if session is not None:
        check_call(model, session.batches[0], "calibration batch 0")
    if example_inputs is not None:
        check_call(model, example_inputs, "example_inputs")
    teacher = model
    # Tensors made in inference mode could never be differentiated through.
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = copy_model(model)
        folding = fold(model, example_inputs, config)
        if session is not None:
            session.refuse_folded(folding.rotated)
            model = session.enter(model)
        model, rows = _convert(model, config, progress, session, folding)
        if session is not None:
            model = session.leave(model)
        switch_off_fast_paths(model)
    if session is not None:
        session.train(model, teacher, rows)
    rows.extend(stacked_rows(model, config))
    model._ternc_rows = rows  # type: ignore[assignment]
    model._ternc_config = config  # type: ignore[assignment]
    if example_inputs is not None:
        mark_uncalled(model, example_inputs, rows)
    return model


def copy_model(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); "
            "quantise it with inplace=True"
        ) from error


def _convert(
    model: nn.Module,
    config: Config,
    progress: bool | None,
    session: Session | None,
    folding: Folding,
) -> tuple[nn.Module, list[Row]]:
    """Replaces modules in place; returns the root, which may be a new one, and the rows."""
    earlier = {row.name: row for row in getattr(model, "_ternc_rows", ())}
    sites = survey(model, config)
    ties = Ties(model, sites, config)
    position = {site.name: index for index, site in enumerate(sites)}
    calibrator = None
    if session is not None:
        layers = _layers_to_fit(sites, ties, config)
        calibrator = session.calibrator(model, layers, folding.rotated)
        order = {name: index for index, name in enumerate(calibrator.order(position))}
        sites.sort(key=lambda site: order[site.name])
    # A queue: nothing here may keep a float weight alive once its layer is packed.
    unrotated = dataclasses.replace(config, rotation="none")
    queue, total = deque(sites), len(sites)
    del sites
    found: list[tuple[int, list[Row]]] = []
    for site in track((queue.popleft() for _ in range(total)), total, "quantize", progress):
        own = unrotated if site.name in folding.rotated else config
        converted = _convert_site(site, own, ties, earlier, calibrator)
        folding.describe(converted.rows)
        rows = list(converted.rows)
        for alias in site.paths[1:]:
            rows += _alias_rows(converted.rows, site.name, alias)
        found.append((position[site.name], rows))
        if converted.module is not None:
            for parent, name in site.parents:
                parent._modules[name] = converted.module
            model = converted.module if "" in site.paths else model
        site.module = converted.module or site.module
    found.sort(key=lambda item: item[0])
    return model, [row for _, rows in found for row in rows]


def _layers_to_fit(sites: Sequence[ModuleSite], ties: Ties, config: Config) -> dict[str, Layer]:
    """What calibration fits, by name: plain linears that nothing keeps in floating point."""
    return {
        site.name: Layer.of(site.module, site.spelling)
        for site in sites
        if site.spelling is not None
        and not isinstance(site.module, QATLinear)
        and not (site.int8 or site.spelling is EMBEDDING)
        and not (site.excluded(config) or ties.why_not(site.name) or why_not(site.module))
    }


def _convert_site(
    site: ModuleSite,
    config: Config,
    ties: Ties,
    earlier: Mapping[str, Row],
    calibrator: Calibrator | None,
) -> Converted:
    module, name = site.module, site.name
    if isinstance(module, TernaryLinear):
        return Converted(None, [earlier.get(name) or packed_row(name, module)])
    reason = site.excluded(config) or ties.why_not(name)
    if is_attention(module):
        return convert_attention(module, name, config, reason)
    if site.spelling is None:
        reason = f"asked for as int8, but a {type(module).__name__} is no linear and no embedding"
        return Converted(None, [skipped_row(name, "other", reason, module)])
    if reason is None and (tied := ties.packed(name)) is not None:
        row, layer = tied
        packed = convert_tied(module, layer, site.spelling)
        row = dataclasses.replace(
            row, pattern=site.spelling.pattern, format=describe(packed), shape=packed.packed.shape
        )
        return Converted(packed, _alias_rows([row], row.name, name))
    calibrated = None if calibrator is None else calibrator.decide
    converted = convert_linear(module, name, config, site.spelling, reason, calibrated, site.int8)
    ties.remember(name, converted)
    return converted


def _alias_rows(rows: Sequence[Row], name: str, alias: str) -> list[Row]:
    """The rows of a weight once more, under another path of it."""
    return [
        dataclasses.replace(
            row,
            name=alias + row.name[len(name) :],
            shared_with=row.name,
            reason=f"one weight with {row.name!r}: {row.reason}",
        )
        for row in rows
    ]
