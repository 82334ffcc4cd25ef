"""One float module -> the packed module that takes its place, and a report row for each weight.

    nn.Linear, transposed linear -> TernaryLinear
    nn.Embedding, on request     -> TernaryEmbedding
    nn.MultiheadAttention        -> TernaryMultiheadAttention

A weight stays floating point where its row says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils import parametrize

from ternc.config import Config
from ternc.decision import decide, decide_int8, decide_rotated, rotation_asked
from ternc.formats.quantized import Refusal
from ternc.modules.attention import (
    TernaryMultiheadAttention,
    separate_float_projections,
    split_projections,
)
from ternc.modules.embedding import TernaryEmbedding
from ternc.modules.linear import TernaryLinear, describe
from ternc.policy import excluded, refine_rounds
from ternc.reporting import Row
from ternc.runtime.ops.definition import FLOAT_TYPES
from ternc.site import Decision
from ternc.train.linear import QATLinear


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A way to write y = x W^T + b as a module."""

    pattern: str
    """Name in reports."""
    transposed: bool
    """The module holds its weight as [in_features, out_features]."""
    matches: Callable[[nn.Module], bool]


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """True for `nn.MultiheadAttention` and what is derived from it."""
    return isinstance(module, nn.MultiheadAttention)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not getattr(module, "transposed", False)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Known by its attributes, then by what it computes: x W + b with W [in_features, nf]."""
    if isinstance(module, QATLinear):
        return module.transposed
    weight, width = module._parameters.get("weight"), vars(module).get("nf")
    if isinstance(module, nn.Linear) or weight is None or nn.parameter.is_lazy(weight):
        return False
    if weight.dim() != 2 or weight.shape[1] != width or weight.is_meta:
        return False
    if not weight.is_floating_point():
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        probe = torch.randn(2, weight.shape[0]).to(weight)
        try:
            seen = type(module).forward(module, probe)
        except Exception:
            return False  # whatever it is, it is not that product
        bias = getattr(module, "bias", None)
        expected = probe @ weight + (0 if bias is None else bias)
    tolerance = 16 * torch.finfo(weight.dtype).eps * weight.shape[0] ** 0.5
    return isinstance(seen, torch.Tensor) and torch.allclose(
        seen.float(), expected.float(), rtol=tolerance, atol=tolerance
    )


SPELLINGS = (
    Spelling("linear", False, _is_linear),
    Spelling("transposed linear", True, _is_transposed_linear),
)


EMBEDDING = Spelling("embedding", False, lambda module: isinstance(module, nn.Embedding))
"""Rows of a weight: no product, but the same weight where it is tied to one."""


def spelling_of(module: nn.Module) -> Spelling | None:
    """How `module` writes a linear map, or None where it is none."""
    return next((spelling for spelling in SPELLINGS if spelling.matches(module)), None)


def float_weight(module: Any) -> torch.Tensor:
    """Value of `module.weight`, its parametrisations evaluated as in eval mode."""
    if not parametrize.is_parametrized(module):
        return module.weight.detach()
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        return module.weight.detach()
    finally:
        for part, training in modes:
            part.training = training


def matrix_shape(module: nn.Module, spelling: Spelling | None) -> tuple[int, ...]:
    """(N, K) of the weight; () where the module holds no plain matrix."""
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return ()
    transposed = spelling is not None and spelling.transposed
    return tuple(weight.shape[::-1] if transposed else weight.shape)


_KNOWN_FORWARDS = (nn.Linear.forward, QATLinear.forward)


def why_not(module: Any) -> str | None:
    """Why this linear (or attention) module cannot be replaced, or None where it can."""
    cls = type(module)
    if "forward" in vars(module):
        return "its forward is replaced on the instance; compile it with backend='ternc'"
    if is_attention(module):
        if cls.forward is not nn.MultiheadAttention.forward:
            return f"subclass {cls.__name__} overrides forward; compile it with backend='ternc'"
        weights = [module.in_proj_weight, module.q_proj_weight, module.out_proj.weight]
        return next((reason for weight in weights if (reason := _why_not_weight(weight))), None)
    if isinstance(module, nn.Embedding):
        if cls.forward is not nn.Embedding.forward:
            return f"subclass {cls.__name__} overrides forward; compile it with backend='ternc'"
        if module.max_norm is not None:
            return "max_norm rewrites rows of the weight as they are looked up"
    if isinstance(module, nn.Linear) and cls.forward not in _KNOWN_FORWARDS:
        return f"subclass {cls.__name__} overrides forward; compile it with backend='ternc'"
    if "weight" in vars(module):
        return "its weight is recomputed by a hook; use torch.nn.utils.parametrize instead"
    weight = module._parameters.get("weight")
    return _why_not_weight(float_weight(module) if weight is None else weight)


def _why_not_weight(weight: torch.Tensor | None) -> str | None:
    if weight is None:
        return None
    if nn.parameter.is_lazy(weight):
        return "its weight is not initialised yet; run the model once"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if weight.dtype not in FLOAT_TYPES:
        return f"its weight is {weight.dtype}; float32, bfloat16 and float16 are taken"
    return None


@dataclasses.dataclass
class Converted:
    """What takes the place of a module (None: it stays), and its report rows."""

    module: nn.Module | None
    rows: list[Row]


def convert_linear(
    module: nn.Module,
    name: str,
    config: Config,
    spelling: Spelling,
    reason: str | None,
    calibrated: Callable[[str], Decision | Refusal] | None = None,
    int8: bool = False,
) -> Converted:
    """A linear or embedding module -> its packed one. `reason` keeps it in floating point.

    `calibrated` decides by what the layer is given; where it refuses, the weight alone does.
    `int8`: the weight is held as int8 codes, whatever it is given.
    """
    reason = reason or why_not(module)
    weight = None if reason else float_weight(module)
    if weight is not None:
        if isinstance(module, QATLinear):
            config = module.config
        matrix = weight.t() if spelling.transposed else weight
        if int8:
            decision = decide_int8(matrix)
        elif spelling is EMBEDDING:
            decision = decide(matrix, None, config, refine_rounds(config))
        else:
            decision = _decide(module, name, matrix, config, calibrated)
        reason = decision.reason
    if weight is None or decision.quantized is None:
        row = skipped_row(name, spelling.pattern, str(reason), module)
        row.shape = row.shape[::-1] if spelling.transposed else row.shape
        row.output_error = None if weight is None else decision.output_error
        return Converted(None, [row])
    layer = _packed_class(spelling).from_quantized(
        decision.quantized,
        _bias(module) if decision.bias is None else _corrected(_bias(module), decision.bias),
        config=config,
        weight_dtype=weight.dtype,
        transposed=spelling.transposed,
        rotation=decision.rotation,
    )
    carry_over(module, layer)
    return Converted(layer, [_rewritten_row(name, spelling.pattern, weight, decision, layer)])


def _packed_class(spelling: Spelling) -> type[TernaryLinear]:
    return TernaryEmbedding if spelling is EMBEDDING else TernaryLinear


def _decide(
    module: nn.Module,
    name: str,
    w: torch.Tensor,
    config: Config,
    calibrated: Callable[[str], Decision | Refusal] | None,
) -> Decision:
    """By what was trained, by what the layer is given, or else by the weight [N, K] alone."""
    if isinstance(module, QATLinear):
        return module.decision(name) or _decide_by_weight(w, config)
    if calibrated is None:
        return _decide_by_weight(w, config)
    found = calibrated(name)
    if isinstance(found, Decision):
        return found
    decision = _decide_by_weight(w, config)
    return dataclasses.replace(decision, reason=f"{decision.reason}; {found.reason}")


def _decide_by_weight(w: torch.Tensor, config: Config) -> Decision:
    """The decision for a weight [N, K] whose inputs are not known, rotated if `config` says so."""
    rotation = rotation_asked(config, w.shape[1])
    return decide_rotated(w, None, config, rotation, refine_rounds(config))


def convert_tied(module: nn.Module, layer: TernaryLinear, spelling: Spelling) -> TernaryLinear:
    """A module whose weight `layer` has packed already: the same buffers, its own bias."""
    tied = _packed_class(spelling)(
        layer.packed,
        _bias(module),
        config=layer.config,
        weight_dtype=layer.weight_dtype,
        transposed=spelling.transposed,
        rotation=layer.rotation,
    )
    carry_over(module, tied)
    return tied


def convert_attention(
    module: nn.MultiheadAttention, name: str, config: Config, reason: str | None
) -> Converted:
    """`nn.MultiheadAttention` -> TernaryMultiheadAttention, if any projection is quantised."""
    pattern = "multihead_attention"
    reason = reason or why_not(module)
    if reason:
        return Converted(None, [skipped_row(name, pattern, reason, module)])
    projections: dict[str, nn.Module] = {}
    rows = []
    for part, linear in split_projections(module).items():
        path = f"{name}.{part}" if name else part
        kept = excluded(path, config) or excluded(name, config)
        spelling = dataclasses.replace(SPELLINGS[0], pattern=f"{pattern}.{part}")
        converted = convert_linear(linear, path, config, spelling, kept)
        projections[part] = converted.module or linear
        rows += converted.rows
    if all(row.action == "skipped" for row in rows):
        return Converted(None, rows)
    separate_float_projections(projections)
    attention = TernaryMultiheadAttention.from_attention(module, projections)
    carry_over(module, attention)
    for projection in projections.values():
        projection.train(module.training)
    return Converted(attention, rows)


def switch_off_fast_paths(model: nn.Module) -> None:
    """Makes torch's transformer encoders call their layers where one is packed or trained.

    Their fused inference path and their nested-tensor path read weights and call no module.
    """
    for module in model.modules():
        if not any(isinstance(part, (TernaryLinear, QATLinear)) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "neither": torch then takes the plain path
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def skipped_row(name: str, pattern: str, reason: str, module: nn.Module) -> Row:
    """Row of a module whose weights stay what they are."""
    weights = [w for w in module.parameters() if not nn.parameter.is_lazy(w) and w.dim() == 2]
    nbytes = sum(weight.nbytes for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return Row(
        name=name,
        pattern=pattern,
        action="skipped",
        reason=reason,
        shape=tuple(weights[0].shape) if weights else (),
        bytes_before=nbytes,
        bytes_after=nbytes,
        bytes_at_rest=nbytes,
        bits_per_weight=8 * nbytes / count if count else 0.0,
    )


def packed_row(name: str, layer: TernaryLinear) -> Row:
    """Row of a layer that was packed before; what it weighed as a float weight is in its dtype."""
    packed = layer.packed
    count = layer.out_features * layer.in_features
    return Row(
        name=name,
        pattern="embedding" if isinstance(layer, TernaryEmbedding) else "linear",
        action="rewritten",
        reason="packed before",
        format=describe(layer),
        shape=packed.shape,
        bytes_before=count * layer.weight_dtype.itemsize,
        bytes_after=packed.nbytes,
        bytes_at_rest=packed.nbytes_at_rest,
        bits_per_weight=8 * packed.nbytes / count if count else 0.0,
    )


def _rewritten_row(
    name: str, pattern: str, weight: torch.Tensor, decision: Decision, layer: TernaryLinear
) -> Row:
    return dataclasses.replace(
        packed_row(name, layer),
        pattern=pattern,
        reason=decision.reason,
        bytes_before=weight.nbytes,
        weight_error=decision.error,
        output_error=decision.output_error,
    )


def _bias(module: Any) -> nn.Parameter | None:
    """The Parameter itself, so that it stays tied; a computed bias becomes one."""
    if isinstance(module, nn.Embedding):
        return None
    bias = module.packed_bias() if isinstance(module, QATLinear) else module.bias
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach().clone(), bias.requires_grad)


def _corrected(bias: nn.Parameter | None, value: torch.Tensor) -> nn.Parameter:
    """A Parameter of its own: the bias may be shared, and the float model keeps its."""
    return nn.Parameter(value, bias is not None and bias.requires_grad)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Mode and hooks. The very same dictionaries: a handle of a hook still removes it.

    The submodules of a linear belong to its hooks, and move with them.
    """
    new.training = old.training
    if isinstance(old, nn.Linear):
        new._modules.update(old._modules)
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
