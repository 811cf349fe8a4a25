"""The basis in which a token is quantised: an invertible map that the projections absorb, so that it costs nothing.

Channel i of a latent has variance s_i, and a squared error of it costs w_i. Numbers that an orthonormal matrix of equal
magnitudes spreads over each other have one variance, the mean of theirs, and their errors in 4 bits are a fraction q of it
(QuaRot, arXiv 2404.00456). Channels scaled by f_i first have a mean variance of mean(f_i^2 s_i), and their errors cost
mean(w_i / f_i^2) each: in n channels n q mean(f_i^2 s_i) mean(w_i / f_i^2), which is least, n q mean(sqrt(w_i s_i))^2, for
f_i^4 = w_i / s_i (by Cauchy and Schwarz). Channels that are not spread cost n q mean(w_i s_i), the more, the more their
costs differ.

The numbers of a rotary key are scaled plane by plane, as RoPE turns a plane; they are spread behind RoPE, when the model runs
(`LatentFormat.spread`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_convert.method.factorise.linalg import balance
from mla_convert.method.factorise.svd import MlaWeights
from mla_convert.modeling.latent_format_mla import LatentFormat, spreading

# Least variance and cost of a channel, as a fraction of the largest: a channel without them still has a scale.
FLOOR = 1e-9


def _even(variance: Tensor, cost: Tensor) -> Tensor:
    """Factors f (n,) with f^4 = cost / variance."""
    floor = [part.clamp_min(FLOOR * part.max()).clamp_min(torch.finfo(part.dtype).tiny) for part in (cost, variance)]
    return (floor[0] / floor[1]) ** 0.25


@dataclass(frozen=True)
class Latent:
    """The projections of a latent, and its channels.

    Attributes:
        down: latent rows of kv_a (r, d).
        bias: of these rows (r,), or None.
        up: kv_b (n, r).
        variance: second moment of each channel (r,).
        cost: of a squared error of one in each channel (r,).
    """

    down: Tensor
    bias: Tensor | None
    up: Tensor
    variance: Tensor
    cost: Tensor

    def ordered(self) -> Latent:
        """The same with the channels in the order of their cost, most first."""
        order = (self.variance * self.cost).argsort(descending=True)
        return Latent(
            self.down[order],
            None if self.bias is None else self.bias[order],
            self.up[:, order],
            self.variance[order],
            self.cost[order],
        )

    def turned(self, sections: tuple[int, ...], basis: str = "spread") -> Latent:
        """The same in a basis in which it is quantised; each channel's variance is then its section's mean, its cost dropped.

        Args:
            sections: channels of each section of a row.
            basis: "spread"; "scaled" makes all variances equal and spreads nothing.
        """
        if basis == "scaled":
            size = self.variance.clamp_min(FLOOR * self.variance.max()).rsqrt()
            turn = torch.eye(len(size)).to(self.variance)
        else:
            size = _even(self.variance, self.cost)
            turn = torch.block_diag(*map(spreading, sections)).to(self.variance)
        down, up = turn @ (self.down * size[:, None]), self.up / size @ turn.mT
        bias = None if self.bias is None else turn @ (self.bias * size)
        parts = torch.arange(len(size), device=down.device).split(list(sections))
        # one factor for each section, as the closed form has for each channel: both projections of about equal size
        each = torch.cat([
            balance(up[:, part].square().mean(), down[part].square().mean()).expand(len(part)) for part in parts
        ])  # fmt: skip
        spread = self.variance * size.square()
        mean = torch.cat([spread[part].mean().expand(len(part)) for part in parts])
        return Latent(
            down * each[:, None],
            None if bias is None else bias * each,
            up / each,
            mean * each.square(),
            torch.zeros_like(self.cost),
        )


def rope_factors(variance: Tensor, cost: Tensor, latent: Latent | None) -> Tensor:
    """Factors (2m,) of the numbers of a rotary key in 4 bits; queries are divided by them.

    Args:
        variance: second moment of each number (2m,), equal in the dims of a plane.
        cost: of a squared error of one in each number, likewise.
        latent: in its basis; the rotary key gets the variance of its last channels, which may share a scale with it.
    """
    size = _even(variance, cost)
    level = 1.0 if latent is None or not len(latent.variance) else latent.variance[-1]
    spread = (variance * size.square()).mean()
    return size * (level / spread).sqrt() if spread > 0 and level > 0 else size


def in_basis(weights: MlaWeights, row: LatentFormat | None, basis: str = "spread") -> MlaWeights:
    """Weights of the same function, with token rows in the basis in which they are quantised best.

    Args:
        weights: in closed form, their channels ordered by cost.
        row: format of the cached rows; None and "fp8", whose error is relative to every number, change nothing.
        basis: as in `Latent.turned`; "pca" changes nothing.
    """
    if row is None or row.kind == "fp8" or basis == "pca":
        return weights
    rank, bias, latent = row.rank, weights.kv_a_bias, None
    if rank:
        latent = Latent(
            weights.kv_a[:rank],
            None if bias is None else bias[:rank],
            weights.kv_b,
            weights.channel_variance,
            weights.channel_cost,
        ).turned((row.wide, rank - row.wide), basis)
        weights = replace(
            weights,
            kv_a=torch.cat([latent.down, weights.kv_a[rank:]]),
            kv_b=latent.up,
            kv_a_bias=None if bias is None else torch.cat([latent.bias, bias[rank:]]),
        )
    if row.rope != "int4" or not row.rope_dim:
        return weights
    return _with_rope_factors(weights, rank, rope_factors(weights.rope_variance, weights.rope_cost, latent))


def query_factors(factors: Tensor, heads: int, rows: int) -> Tensor:
    """Factors of all rows of the query projection (rows,) that undo those of the rotary key (2m,)."""
    undone = torch.ones(heads, rows // heads).to(factors)
    undone[:, -len(factors) :] /= factors
    return undone.flatten()


def _with_rope_factors(weights: MlaWeights, rank: int, factors: Tensor) -> MlaWeights:
    """Multiply the rows of the rotary key by factors (2m,), and divide those of the queries."""
    undone = query_factors(factors, weights.num_heads, len(weights.q_proj))
    bias, q_bias = weights.kv_a_bias, weights.q_bias
    return replace(
        weights,
        q_proj=weights.q_proj * undone[:, None],
        q_bias=None if q_bias is None else q_bias * undone,
        kv_a=torch.cat([weights.kv_a[:rank], weights.kv_a[rank:] * factors[:, None]]),
        kv_a_bias=None if bias is None else torch.cat([bias[:rank], bias[rank:] * factors]),
    )
