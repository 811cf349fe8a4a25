"""Fewer content dims in each head: the part of queries and keys without rotation, in the directions that logits need.

A content logit of a head is q^T k, with q and k of d_h dims. Maps q' = A q and k' = C k to N < d_h dims replace it by
q^T A^T C k. With Q = E[q q^T] and K = E[k k^T], the expected squared error is least where A^T C is
Q^(-1/2) U U^T Q^(1/2), U being the N leading eigenvectors of Q^(1/2) K Q^(1/2) (Eckart, Young and Mirsky); it is the sum of
the eigenvalues that are left out. Directions that no key has cost nothing: those of planes that stay rotary, and of
frequencies whose mean rotation is near 0. The elements of q' are uncorrelated, so that this error and the latent's add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mla_convert.method.factorise.linalg import COST_RIDGE, balance, eigh, ridged

__all__ = ["Content", "narrowed"]


@dataclass(frozen=True)
class Content:
    """Content of H heads in N dims; G kv heads of size d_h, input size d.

    Attributes:
        query: rows (H, N, d+1) of the queries.
        key_maps: (H, N, G*d_h) from all keys to each head's content key.
        cost: (H, N, N) of an error in these keys.
        lost: expected squared error of the logits by fewer dims, in the unit of `cost`.
        total: expected squared content logits, in the same unit; None where all dims are kept.
    """

    query: Tensor
    key_maps: Tensor
    cost: Tensor
    lost: float = 0.0
    total: float | None = None


def narrowed(whole: Content, keys: Tensor, tokens: Tensor, count: int | None) -> Content:
    """The best content of at most `count` dims in each head.

    Args:
        whole: content in all dims.
        keys: (G*d_h, d+1) rows of the keys.
        tokens: (d+1, d+1) second moment of their input.
        count: N; None, or one that is not below the dims of `whole`, keeps them as they are.
    """
    if count is None or count >= whole.cost.shape[-1]:
        return whole
    rows = whole.key_maps @ keys
    # Ridges: a head without values has no costs, and directions that calibration never saw must not count as empty.
    values, vectors = eigh(ridged(whole.cost, COST_RIDGE))
    size = values.clamp_min(values[..., -1:] * COST_RIDGE**2).sqrt()[:, None, :]
    root, inverse = (vectors * size) @ vectors.mT, (vectors / size) @ vectors.mT
    energy, directions = (part.flip(-1) for part in eigh(root @ (rows @ ridged(tokens, COST_RIDGE) @ rows.mT) @ root))
    lead = directions[..., :count].mT
    read, write = lead @ inverse, lead @ root
    # As for planes: rows of equal size.
    size = balance((read @ whole.query).square().mean(-1), (write @ rows).square().mean(-1))[..., None]
    read, write = read / size, write * size
    energy = energy.clamp_min(0)
    return Content(
        query=read @ whole.query,
        key_maps=write @ whole.key_maps,
        cost=read @ whole.cost @ read.mT,
        lost=float(energy[..., count:].sum()),
        total=float(energy.sum()),
    )
