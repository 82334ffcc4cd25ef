"""Float weights of a compiled graph -> packed tensors, kept while the weights do not change.

A packed weight is found by the identity of the tensors it was computed from, and is current while
their versions and storages are. Repacking writes in place where the shapes agree, so captured
addresses stay valid. A write that leaves no trace (`p.data.copy_()`) is not seen: `forget` is for
that.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ternc.formats import Packed, Quantized, pack, resident_layout
from ternc.runtime.identity import at_death
from ternc.site import Decision, Variant, WeightSite

_Key = tuple[tuple[int, ...], str, int]
_Stamp = tuple[tuple[int, int, int], ...]


@dataclasses.dataclass
class PackedWeight:
    """Packed tensors of one weight as it is now.

    `packed` is None where the weight has to stay floating point now; it is then recomputed at
    every call. `storages` keeps the identities in `stamp` from being given to new storages; it
    holds no data.
    """

    stamp: _Stamp
    reason: str
    error: float | None
    packed: Packed | None
    variant: Variant | None
    repacks: int = 0
    storages: tuple[StorageWeakRef, ...] = ()


def variant_of(packed: Packed) -> Variant:
    return Variant(
        packed.layout,
        packed.group_size,
        tuple(packed.scale.shape),
        packed.multiplier is not None,
    )


class PackCache:
    """Packed weights by source tensors; entries die with the tensors they were computed from."""

    def __init__(self) -> None:
        self._entries: dict[_Key, PackedWeight] = {}
        self._lock = threading.RLock()
        self._sees_optimizers = False

    def find(self, site: WeightSite, sources: Sequence[torch.Tensor]) -> PackedWeight | None:
        """The packed form of `site` for these source tensors, if it is there and current."""
        entry = self._entries.get(_key(site, sources))
        return entry if entry is not None and entry.stamp == _stamp(sources) else None

    def peek(self, site: WeightSite, sources: Sequence[torch.Tensor]) -> PackedWeight | None:
        """The packed form of `site` for these source tensors as it was last packed."""
        return self._entries.get(_key(site, sources))

    def pack(
        self, site: WeightSite, sources: Sequence[torch.Tensor], decision: Decision | None = None
    ) -> PackedWeight:
        """Packs or repacks `site`; `decision` is one that was just made for these very tensors."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if decision is None:
                decision = site.decide(site.evaluate(sources), site.planes)
            return self._store(_key(site, sources), site, sources, decision)

    def forget(self, tensors: Sequence[torch.Tensor]) -> int:
        """Marks every weight computed from any of `tensors` as out of date; returns how many."""
        identities = {id(tensor) for tensor in tensors}
        count = 0
        with self._lock:
            for key, entry in self._entries.items():
                if identities.intersection(key[0]):
                    entry.stamp = ()
                    count += 1
        return count

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def _store(
        self,
        key: _Key,
        site: WeightSite,
        sources: Sequence[torch.Tensor],
        decision: Decision,
    ) -> PackedWeight:
        self._see_optimizers()
        packed = None
        if decision.quantized is not None:
            packed = _own_storage(_pack(decision.quantized, site))
        old = self._entries.get(key)
        if old is None:
            self._watch(key, sources)
        elif packed is not None and old.packed is not None:
            packed = _write_in_place(old.packed, packed)
        variant = None
        if packed is not None:
            turned = decision.rotation is not None
            variant = dataclasses.replace(variant_of(packed), rotated=turned)
        entry = PackedWeight(
            _stamp(sources),
            decision.reason,
            decision.error,
            packed,
            variant,
            0 if old is None else old.repacks + 1,
            tuple(StorageWeakRef(source.untyped_storage()) for source in sources),
        )
        self._entries[key] = entry
        return entry

    def _see_optimizers(self) -> None:
        """Fused optimisers write their parameters without a new version: their steps are seen."""
        if self._sees_optimizers:
            return
        self._sees_optimizers = True

        def forget_fused(optimizer: torch.optim.Optimizer, *_: object) -> None:
            groups = (group for group in optimizer.param_groups if group.get("fused"))
            if written := [parameter for group in groups for parameter in group["params"]]:
                self.forget(written)

        register_optimizer_step_post_hook(forget_fused)

    def _watch(self, key: _Key, sources: Sequence[torch.Tensor]) -> None:
        for source in sources:
            at_death(source, self._entries.pop, key, None)


def _key(site: WeightSite, sources: Sequence[torch.Tensor]) -> _Key:
    return (tuple(map(id, sources)), site.key, site.planes)


def _stamp(sources: Sequence[torch.Tensor]) -> _Stamp:
    return tuple(
        (
            -1 if source.is_inference() else source._version,
            source.untyped_storage()._cdata,
            source.data_ptr(),
        )
        for source in sources
    )


def _pack(quantized: Quantized, site: WeightSite) -> Packed:
    plain = resident_layout(quantized.planes, site.device)
    return pack(quantized, plain if site.stacked else site.device)


def _own_storage(packed: Packed) -> Packed:
    """Tensors that are no views: compiled code takes the address of the storage itself."""
    fields = {name: getattr(packed, name) for name in ("weight", "scale", "multiplier")}
    copies = {n: t.clone() for n, t in fields.items() if t is not None and t._is_view()}
    return dataclasses.replace(packed, **copies)


def _write_in_place(old: Packed, new: Packed) -> Packed:
    """`new` in the storage of `old` where every tensor has the same shape, else `new` itself."""
    if variant_of(old) != variant_of(new) or old.weight.shape != new.weight.shape:
        return new
    old.weight.copy_(new.weight)
    old.scale.copy_(new.scale)
    if old.multiplier is not None and new.multiplier is not None:
        old.multiplier.copy_(new.multiplier)
    return old
