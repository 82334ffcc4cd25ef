"""prepare(model) -> the same model with its linears made trainable as ternary layers.

find linears and attention -> decide by value, name and error, as `ternc.quantize` does ->
put `QATLinear`s in their place, rotate the weights behind a Hadamard transform
"""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ternc.config import Config
from ternc.decision import decide
from ternc.errors import TrainingError
from ternc.formats.blend import FLOAT, TERNARY
from ternc.formats.rotation import Rotation
from ternc.module_sites import ModuleSite, Ties, glob_names, survey
from ternc.modules.attention import (
    TernaryMultiheadAttention,
    separate_float_projections,
    split_projections,
)
from ternc.modules.conversion import (
    EMBEDDING,
    SPELLINGS,
    Spelling,
    carry_over,
    float_weight,
    is_attention,
    skipped_row,
    switch_off_fast_paths,
    why_not,
)
from ternc.modules.ties import memory_key
from ternc.policy import excluded, refuse_live, unmatched
from ternc.quantization import copy_model
from ternc.reporting import Report, Row, Totals
from ternc.runtime import ops
from ternc.site import Decision
from ternc.train.config import Hadamard, TrainConfig, as_train_config
from ternc.train.linear import QATLinear, SiteSettings
from ternc.train.schedule import BlendState
from ternc.train.site import final_states, layers


def prepare(
    model: nn.Module, config: TrainConfig | Config | None = None, *, inplace: bool = False
) -> nn.Module:
    """`model` with every layer that `ternc.quantize` would pack made trainable as a ternary one.

    The root keeps its class and forward; Parameters stay the objects that they are (those of a
    fused attention are cut into one for each projection), so make the optimiser afterwards. With a
    schedule the model starts at its beginning: floating point, if it has a ramp.

    Args:
        config: `TrainConfig`, or a plain `Config` of what the weights become. A model that was
            prepared before keeps its own.
        inplace: change `model` itself; otherwise a copy.

    Raises:
        ConfigError: settings that this version does not obey, or that contradict each other.
        UnsupportedModelError: the model cannot be copied.
    """
    config = as_train_config(config)
    refuse_live(config.weights)
    ops.register()
    if not inplace:
        model = copy_model(model)
    found = survey(model, config.weights)
    ties = Ties(model, found, config.weights)
    made: dict[Any, QATLinear] = {}
    rows: list[Row] = []
    for site in found:
        module, new_rows = _prepare_site(site, config, ties, made)
        rows += new_rows
        if module is not None:
            for parent, name in site.parents:
                parent._modules[name] = module
            model = module if "" in site.paths else model
    switch_off_fast_paths(model)
    if config.hadamard is not None and made:
        _tell_where_none_is_rotated(list(made.values()), [r.name for r in rows], config.hadamard)
    if not made and hasattr(model, "_ternc_train_config"):
        return model  # prepared before: it keeps the configuration that its layers were made with
    model._ternc_train_config = config  # type: ignore[assignment]
    model._ternc_train_rows = rows  # type: ignore[assignment]
    if config.schedule is not None or config.activation_schedule is not None:
        set_schedule(model, *states_at(config, 0.0, 0.0))
    return model


def states_at(
    config: TrainConfig, weights: float, activations: float
) -> tuple[BlendState | None, BlendState | None]:
    """Both states at a progress of each schedule, in that schedule's unit."""
    return (
        None if config.schedule is None else config.schedule.at(weights),
        None if config.activation_schedule is None else config.activation_schedule.at(activations),
    )


def set_schedule(
    model: nn.Module, weights: BlendState | None, activations: BlendState | None = None
) -> None:
    """Writes a state of the schedules into every site that follows one; nothing is recompiled.

    None stands for the final quantiser.
    """
    for layer in layers(model):
        final_weights, final_activations = final_states(layer)
        follows = layer.settings.formats != (TERNARY,)
        layer.set_schedule(
            weights if follows and weights else final_weights, activations or final_activations
        )


def check_schedules(model: nn.Module, config: TrainConfig) -> None:
    """Raises TrainingError where the layers were not made for the bit-widths of a schedule."""
    found = layers(model)
    for schedule, formats in (
        (config.schedule, [layer.settings.formats for layer in found]),
        (config.activation_schedule, [layer.settings.activation_formats for layer in found]),
    ):
        # A weight that was ternary from the start follows no schedule.
        following = [own for own in formats if own not in ((), (TERNARY,))]
        if schedule is None or not found:
            continue
        wanted = set(schedule.formats) - {TERNARY}
        if not (following or not wanted) or any(not wanted <= set(own) for own in following):
            raise TrainingError(
                f"the schedule has stages of {schedule.formats} bits, the layers were made for "
                f"{following[0] if following else 'none'}; prepare the model with the "
                "configuration that it is trained with"
            )


def finish(model: nn.Module) -> nn.Module:
    """Switches every site to its final quantiser, so that the model can be packed."""
    for layer in layers(model):
        layer.set_schedule(*final_states(layer))
    return model


def training_report(model: nn.Module) -> Report:
    """Which weights `prepare` made trainable, and why the others stay floating point."""
    rows = getattr(model, "_ternc_train_rows", None)
    if rows is None:
        return Report(status="not prepared: ternc.train.prepare(model) makes its layers trainable")
    config: Any = model._ternc_train_config
    notes = unmatched(config.weights, glob_names(model, rows))
    return Report(rows=rows, totals=Totals.of(model, rows, [], set()), notes=notes)


def _prepare_site(
    site: ModuleSite, config: TrainConfig, ties: Ties, made: dict[Any, QATLinear]
) -> tuple[nn.Module | None, list[Row]]:
    module, name = site.module, site.name
    if isinstance(module, QATLinear):
        return None, [skipped_row(name, "linear", "prepared before", module)]
    reason = excluded(name, config.weights, site.shape) or ties.why_not(name)
    if is_attention(module):
        return _prepare_attention(module, name, config, reason, made)
    if site.int8:
        reason = "asked for as int8: it is trained in floating point, and quantize packs it"
    if site.spelling is None or site.spelling is EMBEDDING:
        return None, [skipped_row(name, "embedding", reason or "packed by quantize", module)]
    new, row = _prepare_linear(module, name, config, site.spelling, reason, made)
    return new, [row]


def _prepare_attention(
    module: nn.MultiheadAttention,
    name: str,
    config: TrainConfig,
    reason: str | None,
    made: dict[Any, QATLinear],
) -> tuple[nn.Module | None, list[Row]]:
    reason = reason or why_not(module)
    if reason:
        return None, [skipped_row(name, "multihead_attention", reason, module)]
    projections: dict[str, nn.Module] = dict(split_projections(module))
    separate_float_projections(projections)
    rows = []
    for part, linear in list(projections.items()):
        path = f"{name}.{part}" if name else part
        kept = excluded(path, config.weights) or excluded(name, config.weights)
        new, row = _prepare_linear(linear, path, config, SPELLINGS[0], kept, made)
        projections[part] = new or linear
        rows.append(row)
    if all(row.action == "skipped" for row in rows):
        return None, rows
    attention = TernaryMultiheadAttention.from_attention(module, projections)
    carry_over(module, attention)
    for projection in projections.values():
        projection.train(module.training)
    return attention, rows


def _prepare_linear(
    module: Any,
    name: str,
    config: TrainConfig,
    spelling: Spelling,
    reason: str | None,
    made: dict[Any, QATLinear],
) -> tuple[QATLinear | None, Row]:
    reason = reason or why_not(module) or _why_not_trainable(module)
    if reason:
        return None, skipped_row(name, spelling.pattern, reason, module)
    weight = module.weight
    tied = made.get(memory_key(weight))
    matrix = float_weight(module)
    matrix = matrix.t() if spelling.transposed else matrix
    decision = decide(matrix, tied.settings.planes if tied else None, config.weights)
    exact = decision.quantized is not None and decision.quantized.exact
    if decision.quantized is None or (exact and not weight.requires_grad):
        return None, skipped_row(name, spelling.pattern, decision.reason, module)
    settings = _settings(name, config, decision, matrix.shape[1], shared=tied is not None)
    layer = QATLinear(
        weight,
        module.bias,
        settings if tied is None else tied.settings,
        config=config.weights,
        transposed=spelling.transposed,
    )
    if layer.settings.rotation is not None:
        _rotate(layer)
    if tied is not None:
        layer.learnt_scale = tied.learnt_scale
    made[memory_key(weight)] = layer
    carry_over(module, layer)
    row = skipped_row(name, spelling.pattern, decision.reason, module)
    return layer, dataclasses.replace(
        row,
        action="rewritten",
        pattern=f"{spelling.pattern} (training)",
        format=f"ternary x{layer.settings.planes}, floating point while it trains",
        weight_error=decision.error,
    )


def _why_not_trainable(module: Any) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrised: the parametrisation is kept while training"
    return None


def _settings(
    name: str, config: TrainConfig, decision: Decision, columns: int, shared: bool
) -> SiteSettings:
    """What one layer becomes. A weight that is ternary already keeps its own units and schedule."""
    quantized = decision.quantized
    assert quantized is not None
    weights, hadamard = config.weights, config.hadamard
    if quantized.exact:
        tensor = quantized.scale.shape == (1,)
        return SiteSettings(
            planes=quantized.planes,
            group_size=quantized.group_size or (-1 if tensor else 0),
            activation_bits=weights.op_activation_bits,
        )
    rotation = None
    if hadamard is not None and not shared and _matches(name, hadamard.layers):
        rotation = Rotation.of(columns, weights.seed)
    return SiteSettings(
        planes=quantized.planes,
        group_size=0 if weights.fit_group >= columns else weights.fit_group,
        scale=config.scale,
        activation_bits=weights.op_activation_bits,
        formats=config.schedule.formats if config.schedule else (TERNARY,),
        activation_formats=_activation_formats(config),
        rotation=rotation if rotation and rotation.block > 1 else None,
        learn_scale=bool(rotation and hadamard and hadamard.learn_scale),
        learn_shift=bool(rotation and hadamard and hadamard.learn_shift),
        dead_zone=config.dead_zone,
    )


def _activation_formats(config: TrainConfig) -> tuple[float, ...]:
    if config.activation_schedule is None:
        return ()
    last = float(config.weights.activation_bits or FLOAT)
    formats = config.activation_schedule.formats
    return formats if last in formats else (*formats, last)


def _tell_where_none_is_rotated(
    made: list[QATLinear], names: list[str], hadamard: Hadamard
) -> None:
    """Warns: a transform that was asked for and is in no layer would go unnoticed."""
    if not any(_matches(name, hadamard.layers) for name in names):
        warnings.warn(
            f"hadamard: no name of the {len(made)} prepared layers ({', '.join(names[:3])}, ...) "
            f"matches {', '.join(hadamard.layers)}; name some in Hadamard(layers=...)",
            stacklevel=3,
        )


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    leaf = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(name, g) or fnmatch.fnmatchcase(f".{leaf}", g) for g in globs)


@torch.no_grad()
def _rotate(layer: QATLinear) -> None:
    """W <- W R, so that (W R)(R^T x) is what the layer computed before."""
    rotation = layer.settings.rotation
    assert rotation is not None
    rotated = rotation.rotate(layer.matrix().detach().contiguous())
    layer.weight.copy_(rotated.t() if layer.transposed else rotated)
    layer.fit_scale()
