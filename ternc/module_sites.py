"""Model, configuration -> the modules that may be replaced, wherever they stand, and which of them
share a weight. What `quantize` packs and `train.prepare` trains is found here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ternc.config import Config
from ternc.modules.attention import PROJECTIONS, TernaryMultiheadAttention
from ternc.modules.conversion import (
    EMBEDDING,
    SPELLINGS,
    Converted,
    Spelling,
    is_attention,
    matrix_shape,
    spelling_of,
    why_not,
)
from ternc.modules.linear import TernaryLinear
from ternc.modules.ties import matrix_key, memory_key
from ternc.policy import excluded, included, marked_int8
from ternc.reporting import Row
from ternc.train.linear import QATLinear


@dataclasses.dataclass
class ModuleSite:
    """A module that may be replaced, and every place it is found at."""

    module: nn.Module
    spelling: Spelling | None
    """None for attention, and for what only has a row."""
    int8: bool = False
    """The configuration asks for int8 codes here, or where the same weight is used too."""
    paths: list[str] = dataclasses.field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.paths[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return matrix_shape(self.module, self.spelling)

    def excluded(self, config: Config) -> str | None:
        """Why the weight stays floating point by its name. A layer that was trained as a ternary
        one, or asked for as int8, is packed whatever it is called.
        """
        if isinstance(self.module, QATLinear) or self.int8:
            return None
        return excluded(self.name, config, self.shape)


def survey(model: nn.Module, config: Config) -> list[ModuleSite]:
    """Every module that deserves a row, in the order of the model."""
    inside = {
        id(part)
        for module in model.modules()
        if is_attention(module)
        for part in module.modules()
        if part is not module
    }
    projections = {
        id(getattr(module, part)): dataclasses.replace(
            SPELLINGS[0], pattern=f"multihead_attention.{part}"
        )
        for module in model.modules()
        if isinstance(module, TernaryMultiheadAttention)
        for part in PROJECTIONS
    }
    sites: dict[int, ModuleSite] = {}
    int8 = _int8_weights(model, config)
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in sites and id(module) not in inside:
            spelling = projections.get(id(module)) or spelling_of(module)
            marked = matrix_key(module) in int8 and not isinstance(module, QATLinear)
            if EMBEDDING.matches(module) and (marked or included(path, config)):
                spelling = EMBEDDING
            found = spelling or is_attention(module) or isinstance(module, TernaryLinear)
            if found or marked:
                sites[id(module)] = ModuleSite(module, spelling, marked)
        if id(module) in sites:
            sites[id(module)].paths.append(path)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in sites:
                sites[id(child)].parents.append((parent, name))
    return list(sites.values())


def _int8_weights(model: nn.Module, config: Config) -> set[Any]:
    """The weights asked for as int8 under any of their names: a tied weight is held once."""
    return {
        matrix_key(module)
        for path, module in model.named_modules(remove_duplicate=False)
        if marked_int8(path, config)
    } - {None}


def glob_names(model: nn.Module, rows: Sequence[Row]) -> set[str]:
    """What name globs may be meant for: rows, and modules that hold tensors."""
    holders = (name for name, m in model.named_modules() if m._parameters or m._buffers)
    return {row.name for row in rows} | set(holders)


class Ties:
    """Which linears share their weight, with whom, and the packed layer of each such weight."""

    def __init__(self, model: nn.Module, sites: Sequence[ModuleSite], config: Config) -> None:
        owners: dict[Any, dict[str, str]] = defaultdict(dict)  # weight -> module -> its name there
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    owners[memory_key(tensor)][path] = f"{path}.{name}" if path else name
        by_path = {site.name: site for site in sites}
        self._group: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}
        self._packed: dict[Any, tuple[Row, TernaryLinear]] = {}
        for site in sites:
            for tensor in _sources(site.module):
                found = owners[memory_key(tensor)]
                others = [path for path in found if not _within(path, site)]
                if others:
                    self._group[site.name] = memory_key(tensor)
                    members = [site, *(by_path.get(path) for path in others)]
                    names = [found[others[0]], *(found[path] for path in others)]
                    if reason := _why_not_together(members, names, config):
                        self._reasons[site.name] = reason

    def why_not(self, name: str) -> str | None:
        """Why the tied weight at `name` stays floating point."""
        return self._reasons.get(name)

    def packed(self, name: str) -> tuple[Row, TernaryLinear] | None:
        """Row and layer of the weight at `name`, if another layer brought it already."""
        return self._packed.get(self._group.get(name))

    def remember(self, name: str, converted: Converted) -> None:
        if name in self._group and isinstance(converted.module, TernaryLinear):
            self._packed[self._group[name]] = (converted.rows[0], converted.module)


def _sources(module: Any) -> list[torch.Tensor]:
    """The tensors that the weights of a module are made of: its biases are shared as they are."""
    if parametrize.is_parametrized(module, "weight"):
        return list(module.parametrizations["weight"].parameters())
    return [
        tensor
        for part in ((module, *module.children()) if is_attention(module) else (module,))
        for name, tensor in part._parameters.items()
        if tensor is not None and name.endswith("weight")
    ]


def _within(path: str, site: ModuleSite) -> bool:
    """`path` is the module of the site, or a part of it."""
    return any(path == own or path.startswith(f"{own}." if own else "") for own in site.paths)


def _why_not_together(
    members: Sequence[ModuleSite | None], names: Sequence[str], config: Config
) -> str | None:
    """One weight is packed where every module that has it is a plain linear or a packed embedding,
    with the weight the same way round.

    `names` are those of the tied tensors, for the message; the first member is told of the second.
    """
    for member, name in zip(members, names, strict=True):
        if not (
            member is not None
            and member.spelling is not None
            and member.spelling.transposed == members[0].spelling.transposed  # type: ignore
            and not parametrize.is_parametrized(member.module)
            and not member.excluded(config)
            and not why_not(member.module)
        ):
            return f"its weight is shared with {name!r}; only plain linears can share a packed one"
    return None
