"""Rewritten graph, weights as they are now -> its outputs, op by op: for calls in which a weight
has another variant than the graph was compiled for. Right, but unfused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ternc.runtime.ops.grouped_linear import ends_of
from ternc.runtime.ops.linears import given
from ternc.runtime.pack import PackedWeight
from ternc.site import WeightSite


class OpByOp(fx.Interpreter):
    """Runs the rewritten graph with every weight in the variant it has now."""

    def __init__(
        self,
        gm: fx.GraphModule,
        entries: dict[int, tuple[WeightSite, PackedWeight]],
        originals: Sequence[Any],
    ) -> None:
        super().__init__(gm)
        self.entries = entries
        self.originals = originals

    def run_node(self, n: fx.Node) -> Any:
        if "ternc_site" in n.meta:
            x, *packed, bias, rows, group, bits, layout = self.fetch_args_kwargs_from_env(n)[0]
            site = n.meta["ternc_site"]
            return self._product(x, None, packed, bias, (rows, group, layout), bits, x.dtype, site)
        if "ternc_call" in n.meta:
            return self._products(n)
        if "ternc_stack" in n.meta:
            return self._experts(n)
        if "ternc_body" in n.meta:
            body, *given = self.fetch_args_kwargs_from_env(n)[0]
            return OpByOp(body, self.entries, self.originals).run(*given)
        if "ternc_table" in n.meta:
            return self._rows(n)
        return super().run_node(n)

    def _rows(self, n: fx.Node) -> torch.Tensor:
        """`ternc::embedding` with the table that the site has now."""
        indices, _, _, _, rows, columns, _, _, dtype = self.fetch_args_kwargs_from_env(n)[0]
        site, entry = self.entries[id(n.meta["ternc_table"])]
        now = entry.packed
        if now is None:
            table = site.evaluate([self.originals[position] for position in site.inputs])
            return F.embedding(indices, table)
        packed = (now.weight, now.scale, now.multiplier)
        return torch.ops.ternc.embedding.default(
            indices, *packed, rows, columns, now.group_size, now.layout, dtype
        )

    def _experts(self, n: fx.Node) -> torch.Tensor:
        """`ternc::grouped_linear` with the stack that the site has now."""
        x, sx, offsets, _, _, _, experts, rows, _, bits, _, dtype = self.fetch_args_kwargs_from_env(
            n
        )[0]
        site, entry = self.entries[id(n.meta["ternc_stack"])]
        now = entry.packed
        if now is not None:
            packed = (now.weight, now.scale, now.multiplier)
            return torch.ops.ternc.grouped_linear.default(
                x, sx, offsets, *packed, experts, rows, now.group_size, bits, now.layout, dtype
            )
        stack = site.evaluate([self.originals[position] for position in site.inputs])
        weights = stack.unflatten(0, (experts, -1))[:, :rows].to(dtype)
        flat = (x if sx is None else x * sx).to(dtype).flatten(0, -2)
        y, begin = flat.new_zeros((flat.shape[0], rows)), 0
        ends = ends_of(offsets, flat.shape[0], experts)
        for weight, end in zip(weights, ends, strict=True):
            y[begin:end] = F.linear(flat[begin:end], weight)
            begin = max(begin, end)
        return y.view(*x.shape[:-1], rows)

    def _products(self, n: fx.Node) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`ternc::linears1..4`, one weight after another."""
        call = n.meta["ternc_call"]
        x, sx, *tensors = self.fetch_args_kwargs_from_env(n)[0]
        if len(call.weights) == 1:
            *packed, bias, residual, rows, group, bits, layout, dtype = tensors
            shape = (rows, group, layout)
            y = self._product(x, sx, packed, bias, shape, bits, dtype, call.sites[0])
            return y if residual is None else y + residual
        weights, scales, multipliers, biases, out_features, group_sizes, bits, layouts, dtype = (
            tensors
        )
        outputs = []
        for i, site in enumerate(call.sites):
            own = (weights[i], scales[i], given(multipliers[i]))
            shape = (out_features[i], group_sizes[i], layouts[i])
            bias = given(biases[i])
            outputs.append(self._product(x, sx, own, bias, shape, bits, dtype, site))
        return tuple(outputs)

    def _product(
        self,
        x: torch.Tensor,
        sx: torch.Tensor | None,
        packed: Sequence[torch.Tensor | None],
        bias: torch.Tensor | None,
        shape: tuple[int, int, int],
        bits: int,
        dtype: torch.dtype,
        site: WeightSite | None,
    ) -> torch.Tensor:
        """One product with the weight that `site` has now; `packed` is what the graph was given."""
        if site is not None:
            site, entry = self.entries[id(site)]
            if site.rotation is not None and not (entry.variant and entry.variant.rotated):
                if sx is not None:  # integers once already
                    x, sx, bits = (x * sx).to(dtype), None, 0
                x = site.rotation.restore(x)
            if entry.packed is None:
                return self._float_product(x, sx, bias, bits, dtype, site)
            now = entry.packed
            packed = (now.weight, now.scale, now.multiplier)
            shape = (now.shape[0], now.group_size, now.layout)
        rows, group, layout = shape
        return torch.ops.ternc.linears1.default(
            x, sx, *packed, bias, None, rows, group, bits, layout, dtype
        )

    def _float_product(
        self,
        x: torch.Tensor,
        sx: torch.Tensor | None,
        bias: torch.Tensor | None,
        bits: int,
        dtype: torch.dtype,
        site: WeightSite,
    ) -> torch.Tensor:
        """The product with the float weight; a quantiser of the model's own comes back."""
        weight = site.evaluate([self.originals[position] for position in site.inputs]).to(dtype)
        if sx is not None:
            x = (x * sx).to(dtype)
        elif site.own_quantizer:
            x = torch.ops.ternc.fake_quantize_act.default(x, bits)
        return F.linear(x, weight, None if bias is None else bias.to(dtype))
