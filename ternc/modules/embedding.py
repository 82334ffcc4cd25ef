"""`TernaryEmbedding`: rows of a packed weight, in the place of an Embedding: ternc::embedding."""

from __future__ import annotations

import torch

from ternc.formats.planewise import folded
from ternc.modules.linear import TernaryLinear


class TernaryEmbedding(TernaryLinear):
    """Lookup table whose weight [num_embeddings, embedding_dim] is int8 or trit planes.

    Input int64 or int32 [...], output [..., embedding_dim] in the dtype of the weight that was
    replaced. It holds its weight as a TernaryLinear does (out_features = num_embeddings,
    in_features = embedding_dim), so that a head which is tied to it shares one copy.
    """

    multiplies = False

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, dequantised.

        Raises:
            RuntimeError: an index is out of range (IndexError from the eager reference).
        """
        apart = self.free_planes > 1
        keep = self.weight_dtype != torch.float64 and self.rotation is None and not apart
        rows = torch.ops.ternc.embedding(
            indices,
            self.packed_weight,
            self.scale.detach(),
            self.multiplier,
            self.num_embeddings,
            self.packed.columns,
            self.group_size,
            self.layout,
            self.weight_dtype if keep else torch.float32,
        )
        if apart:
            rows = folded(rows, self.free_planes, self.group_size, self.embedding_dim)
        if self.rotation is not None:
            rows = self.rotation.restore(rows)
        return rows.to(self.weight_dtype)
