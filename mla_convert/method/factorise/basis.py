"""The basis in which a latent is quantised: an invertible map that kv_a and kv_b absorb, so that it costs nothing.

The closed form gives channels in the order of their cost: channel i has variance s_i and an error e_i of it costs w_i e_i^2.
A group of channels with one scale has about the same error q s in each channel if these have equal variance s, so that the
group costs q * sum(w_i s_i) at best: that of channels scaled by sqrt(w_i) and rotated by a Hadamard matrix, which makes their
variances equal, their errors equally expensive and their distributions nearly normal (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mla_convert.method.factorise.svd import MlaWeights, balance
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


def in_basis(weights: MlaWeights, row: LatentFormat | None, basis: str = "hadamard") -> MlaWeights:
    """Weights of the same function, with the latent in the basis in which it is quantised best.

    Args:
        weights: in closed form, their channels ordered by cost.
        row: format of the cached rows; None and "fp8", whose error is relative to every number, change nothing.
        basis: "hadamard"; "scaled" leaves out the rotation and makes all variances equal; "pca" changes nothing.
    """
    if row is None or row.kind == "fp8" or basis == "pca" or not row.rank:
        return weights
    variance, cost = weights.channel_variance, weights.channel_cost
    rank = len(variance)
    if basis == "scaled":
        size, turn = variance.clamp_min(FLOOR * variance.max()).rsqrt(), torch.eye(rank).to(variance)
    else:
        size = cost.clamp_min(FLOOR * cost.max()).sqrt()
        turn = torch.block_diag(*(hadamard(group) for group in row.groups)).to(variance)
    down, up = turn @ (weights.kv_a[:rank] * size[:, None]), weights.kv_b / size @ turn.mT
    bias = weights.kv_a_bias
    latent_bias = None if bias is None else turn @ (bias[:rank] * size)
    # one factor for each group, as before for each channel: up- and down-projection of about equal size
    each = torch.cat([
        balance(up[:, part].square().mean(), down[part].square().mean()).expand(len(part))
        for part in torch.arange(rank, device=down.device).split(list(row.groups))
    ])  # fmt: skip
    return replace(
        weights,
        kv_a=torch.cat([down * each[:, None], weights.kv_a[rank:]]),
        kv_b=up / each,
        kv_a_bias=None if bias is None else torch.cat([latent_bias * each, bias[rank:]]),
    )
