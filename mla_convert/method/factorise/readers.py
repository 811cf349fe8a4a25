"""Layers that attend to the latent of an earlier one, as further heads of that one: the closed form weighs them all.

When the latent is made, the states before these layers are not known. Their queries are normed, so that the weights of the
norm give their second moment; their attention is taken to reach as far as the own one, and the output of each layer to be as
large as its output projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_convert.method.calibrate.statistics import Statistics
from mla_convert.method.factorise.svd import AttentionWeights, MlaWeights
from mla_convert.source.source import Source


@dataclass(frozen=True)
class Readers:
    """The n later layers that attend to a layer's latent; G KV heads and H query heads, as in that layer.

    Attributes:
        num_kv_heads: G.
        outputs: their output projections (n, d, H * d_h).
        query_norms: weights of their norms of queries (n, d_h).
    """

    num_kv_heads: int
    outputs: Tensor
    query_norms: Tensor

    def _all(self, own: Tensor, others: Tensor) -> Tensor:
        """Heads (H * (1 + n), ...) of all layers, those of a group together, from (H, ...) and (n, H, ...)."""
        heads = torch.cat([own[None], others]).unflatten(1, (self.num_kv_heads, -1))
        return heads.transpose(0, 1).flatten(0, 2)

    def _own(self, rows: Tensor) -> Tensor:
        """The first layer's rows of a matrix whose rows are those of all heads."""
        heads = rows.unflatten(0, (self.num_kv_heads, 1 + len(self.outputs), -1))
        return heads[:, 0].flatten(0, 1).contiguous()

    def join(self, weights: AttentionWeights, statistics: Statistics) -> tuple[AttentionWeights, Statistics, int]:
        """Weights and statistics of an attention with the heads of all layers, and their number.

        Errors of each layer's output count relative to its size.
        """
        count, width = len(self.outputs), self.query_norms.shape[-1]
        o = weights.o.double()
        size = o.norm() / self.outputs.double().flatten(1).norm(dim=1).clamp_min(1e-30)
        others = self.outputs.double() * size[:, None, None]
        o_heads, other_heads = (each.unflatten(-1, (-1, width)).movedim(-2, -3) for each in (o, others))
        q = weights.q.unflatten(0, (len(o_heads), -1))
        moments = torch.diag_embed(torch.cat([self.query_norms.double().square(), o.new_ones(count, 1)], dim=1))
        query, distance = statistics.query_moment, statistics.distance
        if query is None:
            raise ValueError("queries of layers that share a latent are normed")
        heads = len(o_heads)
        joined = self._all(o_heads, other_heads)
        return (
            replace(
                weights,
                q=self._all(q, q.expand(count, *q.shape)).flatten(0, 1),
                o=joined.movedim(0, 1).flatten(1),
            ),
            replace(
                statistics,
                query_moment=self._all(query.double(), moments[:, None].expand(-1, heads, -1, -1)),
                distance=self._all(distance, distance.expand(count, *distance.shape)),
            ),
            heads * (1 + count),
        )

    def part(self, found: MlaWeights, weights: AttentionWeights) -> MlaWeights:
        """The first layer's part of the closed form of all; `weights` are its own."""
        q_proj, kv_b = self._own(found.q_proj), self._own(found.kv_b)
        heads = found.num_heads // (1 + len(self.outputs))
        return replace(found, q_proj=q_proj, kv_b=kv_b, o_proj=weights.o.double(), num_heads=heads)


def readers_of(source: Source, layer: int, device: torch.device) -> Readers | None:
    """The later layers that attend to a layer's keys and values; None if there are none."""
    family = source.family
    paths = [f"{family.layers}.{reader}.{family.attention}." for reader in source.shape.readers_of(layer)[1:]]
    if not paths:
        return None
    parts = [
        source.reader.read([f"{path}{family.output}.weight", f"{path}{family.q_norm}.weight"]).values()
        for path in paths
    ]
    outputs, norms = (torch.stack([each.to(device).float() for each in group]) for group in zip(*parts, strict=True))
    return Readers(source.shape.of(layer).num_kv_heads, outputs, norms)
