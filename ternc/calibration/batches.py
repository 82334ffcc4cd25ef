"""A batch of calibration data -> one call of the model, and which of its rows count.

tensor -> model(x);  tuple or list -> model(*batch);  mapping -> model(**batch)
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ternc.errors import InputError

HELD_OUT_EVERY = 8
"""One batch (or, of a single batch, one row) in so many is kept for judging the fits."""


def arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of the call that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return batch, {}
    return (batch,), {}


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def check_call(model: nn.Module, batch: Any, what: str) -> None:
    """Raises InputError where the model's forward does not take the arguments of a batch.

    Args:
        what: the name of the batch in the message.
    """
    if model._forward_pre_hooks:
        return  # they may change the arguments
    args, kwargs = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except ValueError:
        return  # a forward without a signature
    except TypeError as error:
        raise InputError(
            f"{what} does not fit {type(model).__name__}.forward: {error}; a tuple or list holds "
            "positional arguments, a mapping keyword arguments; leave out labels it does not take"
        ) from error


def materialised(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list: they are gone through many times.

    Raises:
        InputError: there is none, or one holds no tensor; a batch was given in their place.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        raise InputError(
            f"calibration is one {type(batches).__name__}, not batches; give a list: [batch]"
        )
    found = list(batches)
    if not found:
        raise InputError("calibration is empty; give an iterable of batches of model inputs")
    for index, batch in enumerate(found):
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(_plain(batch))):
            raise InputError(
                f"calibration batch {index} is a {type(batch).__name__} without tensors; a batch "
                "is a tensor, a tuple of arguments or a mapping of keyword arguments"
            )
    return found


def held_out(index: int, count: int) -> bool:
    """Whether batch `index` of `count` is kept for judging; none of a single batch."""
    if count < HELD_OUT_EVERY:
        return count > 1 and index == count - 1
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def counted_rows(batch: Any, x: torch.Tensor) -> torch.Tensor:
    """Rows of x [..., K] as [M, K], without the padding that the batch itself names.

    Padding is known where the batch is a mapping with an `attention_mask` of the leading shape
    of x: rows at zeros of it are left out.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.shape == x.shape[:-1]:
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    return rows


def digest(batches: Sequence[Any]) -> str:
    """SHA-256 of every tensor of the batches, in order."""
    found = hashlib.sha256()
    for batch in batches:
        for leaf in pytree.tree_leaves(_plain(batch)):
            if isinstance(leaf, torch.Tensor):
                found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                found.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused path that reads weights around the modules, no cache of
    keys and values; all put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    settings = [config for config in found if getattr(config, "use_cache", False) is True]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for setting in settings:
            setting.use_cache = False
        model.eval()
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for setting in settings:
            setting.use_cache = True
        for module, training in modes:
            module.training = training


def _plain(batch: Any) -> Any:
    """A mapping of any class as a dict, which pytree knows."""
    return dict(batch) if isinstance(batch, Mapping) else batch
