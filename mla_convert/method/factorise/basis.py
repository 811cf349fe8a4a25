"""The basis in which a latent is quantised: an invertible map that kv_a and kv_b absorb, so that it costs nothing.

The closed form gives channels in the order of their cost: channel i has variance s_i and an error e_i of it costs w_i e_i^2.
A group of channels with one scale has about the same error q s in each channel if these have equal variance s, so that the
group costs q * sum(w_i s_i) at best: that of channels scaled by sqrt(w_i) and rotated by a Hadamard matrix, which makes their
variances equal, their errors equally expensive and their distributions nearly normal (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_convert.method.factorise.linalg import balance
from mla_convert.method.factorise.svd import MlaWeights
from mla_convert.modeling.quantised_latent_mla import LatentFormat

# Least cost of a channel, as a fraction of the largest: a channel without cost still has a scale.
FLOOR = 1e-9


def hadamard(size: int) -> Tensor:
    """An orthonormal matrix (size, size) with entries of equal magnitude within blocks, float64.

    Blocks are Hadamard matrices of Sylvester's construction: one for each power of two in `size`.
    """
    blocks, left = [], size
    while left:
        block = torch.ones(1, 1, dtype=torch.float64)
        while 2 * len(block) <= left:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        blocks.append(block / len(block) ** 0.5)
        left -= len(block)
    return torch.block_diag(*blocks) if blocks else torch.empty(0, 0, dtype=torch.float64)


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

    def turned(self, groups: tuple[int, ...], basis: str) -> Latent:
        """The same with each group of channels in a basis in which it is quantised; the channels' figures are dropped.

        Args:
            groups: channels of each group.
            basis: "hadamard"; "scaled" leaves out the rotation and makes all variances equal.
        """
        rank = len(self.variance)
        if basis == "scaled":
            size = self.variance.clamp_min(FLOOR * self.variance.max()).rsqrt()
            turn = torch.eye(rank).to(self.variance)
        else:
            size = self.cost.clamp_min(FLOOR * self.cost.max()).sqrt()
            turn = torch.block_diag(*(hadamard(group) for group in groups)).to(self.variance)
        down, up = turn @ (self.down * size[:, None]), self.up / size @ turn.mT
        bias = None if self.bias is None else turn @ (self.bias * size)
        # one factor for each group, as the closed form has for each channel: both projections of about equal size
        each = torch.cat([
            balance(up[:, part].square().mean(), down[part].square().mean()).expand(len(part))
            for part in torch.arange(rank, device=down.device).split(list(groups))
        ])  # fmt: skip
        return replace(self, down=down * each[:, None], bias=None if bias is None else bias * each, up=up / each)


def in_basis(weights: MlaWeights, row: LatentFormat | None, basis: str = "hadamard") -> MlaWeights:
    """Weights of the same function, with the latent in the basis in which it is quantised best.

    Args:
        weights: in closed form, their channels ordered by cost.
        row: format of the cached rows; None and "fp8", whose error is relative to every number, change nothing.
        basis: as in `Latent.turned`; "pca" changes nothing.
    """
    if row is None or row.kind == "fp8" or basis == "pca" or not row.rank:
        return weights
    rank, bias = row.rank, weights.kv_a_bias
    latent = Latent(
        weights.kv_a[:rank],
        None if bias is None else bias[:rank],
        weights.kv_b,
        weights.channel_variance,
        weights.channel_cost,
    ).turned(row.groups, basis)
    return replace(
        weights,
        kv_a=torch.cat([latent.down, weights.kv_a[rank:]]),
        kv_b=latent.up,
        kv_a_bias=None if bias is None else torch.cat([latent.bias, bias[rank:]]),
    )
