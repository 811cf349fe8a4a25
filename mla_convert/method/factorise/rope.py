"""RoPE (RoFormer, arXiv 2104.09864) in complex numbers, and the choice of the planes that keep their rotation.

Coordinates f and f + n_f of a head (the half-split layout of Llama) form one complex number per frequency f.
With the query at position s, the key at t <= s and D = s - t, a logit is

    sum_f Re( conj(q_f) k_f exp(-i D theta_f) )

so a complex-linear map between kv heads commutes with the rotation (TransMLA, arXiv 2502.07864). A *plane* is one complex
number per token, written by such a map and rotated at one frequency. The part of the keys that no plane carries becomes
*content*: its rotation is replaced by the mean rotation rho = E[exp(-i D theta)] over the distances that a head attends to,
the constant of least squared error. MHA2MLA (arXiv 2502.14837) selects rotary dims of each head instead. DESIGN.md section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mla_convert.method.factorise.linalg import eigh
from mla_convert.method.factorise.sizes import table_frequencies

__all__ = [
    "Planes",
    "by_group",
    "choose_planes",
    "complex_rows",
    "content_maps",
    "even_planes",
    "harmonic_distance",
    "mean_rotation",
    "real_matrix",
    "real_rows",
    "table_planes",
]


@dataclass(frozen=True)
class Planes:
    """m rotary planes shared by all heads; n_f frequencies, G kv heads, H query heads.

    Plane j is z_j = sum_fg write[j, f, g] key[f, g]; head h reads sum_j read[j, f, h] z_j for key[f, g(h)].
    """

    freq_index: Tensor  # (m,) int64, ascending
    write: Tensor  # (m, n_f, G) complex
    read: Tensor  # (m, n_f, H) complex
    lost: Tensor  # () expected squared logit error of the de-rotated part, in the caller's head weights
    total: Tensor  # () expected squared rotary logits, in the same unit


def complex_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Projection rows (heads * d_h, n) in half-split layout as complex numbers (n_f, heads, n)."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return torch.complex(halves[:, 0], halves[:, 1]).transpose(0, 1)


def real_rows(planes: Tensor) -> Tensor:
    """Inverse of `complex_rows`: (n_f, heads, n) complex to (heads * 2 n_f, n), real parts of a head first."""
    halves = torch.stack((planes.real, planes.imag)).permute(2, 0, 1, 3)
    return halves.reshape(-1, planes.shape[-1])


def real_matrix(linear: Tensor) -> Tensor:
    """Complex-linear maps (..., a, b) as real ones (..., 2a, 2b) acting on [real parts; imaginary parts]."""
    top = torch.cat((linear.real, -linear.imag), -1)
    return torch.cat((top, torch.cat((linear.imag, linear.real), -1)), -2)


def mean_rotation(distance: Tensor, inv_freq: Tensor) -> Tensor:
    """Mean rotation rho (H, n_f) = sum_D distance[h, D] exp(-i D inv_freq[f]): complex, |rho| <= 1.

    Args:
        distance: (H, T) attention probability by distance; rows sum to 1.
        inv_freq: (n_f,) radians per position.
    """
    angle = torch.arange(distance.shape[1], device=distance.device, dtype=distance.dtype)[:, None] * inv_freq
    return torch.complex(distance @ angle.cos(), -(distance @ angle.sin()))


def harmonic_distance(num_heads: int, length: int, offset: float = 8.0) -> Tensor:
    """Model (H, T) of attention distances, where none are measured: probability proportional to 1 / (offset + D)."""
    mass = 1 / (offset + torch.arange(length, dtype=torch.float64))
    return (mass / mass.sum()).expand(num_heads, length)


def _plane_basis(key_cov: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Principal complex directions across kv heads at each frequency, largest first.

    Args:
        key_cov: (n_f, G, G) Hermitian E[key conj(key)^T].
        weight: (n_f, G) cost of an error in a key.

    Returns:
        Cost (n_f, G) of dropping plane (f, j), write (n_f, j, G) and its inverse read (n_f, G, j).
    """
    # where no error has a cost, as when values, queries or outputs are zero, all weights are equal
    top = weight.max()
    root = (weight / top if top > 0 else torch.ones_like(weight)).clamp_min(1e-12).sqrt()
    cost, vectors = eigh(root[:, :, None] * key_cov * root[:, None, :])
    cost, vectors = cost.flip(-1).clamp_min(0), vectors.flip(-1)
    return cost, vectors.mH * root[:, None, :], vectors / root[:, :, None]


def _keep(index: Tensor, write: Tensor, read: Tensor, key_cov: Tensor, energy: Tensor, rho: Tensor) -> Planes:
    """Planes of the directions numbered f * G + j in `index`, and the loss of the others; see `choose_planes`."""
    n_f, num_kv = write.shape[:2]
    group = torch.arange(len(rho), device=rho.device) // (len(rho) // num_kv)
    index = index.sort().values
    f, j, slot = index // num_kv, index % num_kv, torch.arange(len(index), device=index.device)
    wide_write = write.new_zeros(len(f), n_f, num_kv)
    wide_read = write.new_zeros(len(f), n_f, len(rho))
    wide_write[slot, f] = write[f, j]
    wide_read[slot, f] = read[f, :, j][:, group]
    dropped = torch.ones(n_f * num_kv, device=index.device, dtype=write.dtype).index_fill(0, index, 0)
    left = (read * dropped.view(n_f, 1, num_kv)) @ write
    lost = (left @ key_cov @ left.mH).diagonal(dim1=-2, dim2=-1).real
    loss = by_group(energy * (1 - rho.abs().square()).clamp_min(0), num_kv)
    total = key_cov.diagonal(dim1=-2, dim2=-1).real * by_group(energy, num_kv)
    return Planes(f, wide_write.cdouble(), wide_read.cdouble(), (lost * loss).sum(), total.sum())


def choose_planes(key_cov: Tensor, query_energy: Tensor, rho: Tensor, count: int) -> Planes:
    """Keep the planes whose de-rotation would cost most, over all frequencies together.

    The error of a key that becomes content is key (exp(-i D theta) - rho); its cost is query energy * (1 - |rho|^2) *
    E|key|^2, summed over the heads of its group. Planes are the principal directions under exactly this weight.

    Args:
        key_cov: (n_f, G, G) complex E[key conj(key)^T].
        query_energy: (H, n_f) E|q|^2 times the weight of the head.
        rho: (H, n_f) mean rotations.
        count: planes to keep.
    """
    n_f, num_kv = key_cov.shape[:2]
    if count == n_f * num_kv:
        # All planes are kept. The heads' own planes round as the source does, whatever biases its keys have.
        identity = torch.eye(num_kv, dtype=key_cov.dtype, device=key_cov.device).expand(n_f, -1, -1)
        return _keep(torch.arange(count, device=key_cov.device), identity, identity, key_cov, query_energy, rho)
    charge = query_energy * (1 - rho.abs().square()).clamp_min(0)
    cost, write, read = _plane_basis(key_cov, by_group(charge, num_kv))
    return _keep(cost.flatten().topk(count).indices, write, read, key_cov, query_energy, rho)


def table_planes(key_cov: Tensor, query_energy: Tensor, rho: Tensor, count: int) -> Planes:
    """`choose_planes` with at most one plane of a frequency, and only of `sizes.table_frequencies`; same arguments.

    Serving engines have one RoPE table for all layers, with one slot for each of its frequencies.
    """
    num_kv = key_cov.shape[1]
    charge = query_energy * (1 - rho.abs().square()).clamp_min(0)
    cost, write, read = _plane_basis(key_cov, by_group(charge, num_kv))
    allowed = torch.tensor(table_frequencies(len(key_cov)), dtype=torch.int64, device=rho.device)
    best = allowed[cost[allowed, 0].topk(count).indices]
    return _keep(best * num_kv, write, read, key_cov, query_energy, rho)


def even_planes(key_cov: Tensor, query_energy: Tensor, rho: Tensor, count: int) -> Planes:
    """The best plane of each of `count` evenly spaced frequencies (then the second best, and so on).

    TransMLA's layout (arXiv 2502.07864), the baseline for `choose_planes` and `table_planes`; same arguments.
    """
    n_f, num_kv = key_cov.shape[:2]
    _, write, read = _plane_basis(key_cov, torch.ones_like(key_cov[..., 0].real))
    rounds, rest = divmod(count, n_f)
    every = torch.arange(n_f, device=rho.device) * num_kv
    even = torch.arange(rest, device=rho.device) * n_f // max(rest, 1) * num_kv + rounds
    index = torch.cat([every + j for j in range(rounds)] + [even])
    return _keep(index, write, read, key_cov, query_energy, rho)


def by_group(per_head: Tensor, num_kv: int) -> Tensor:
    """Sum (H, n_f) over the heads of each kv head: (n_f, G)."""
    return per_head.reshape(num_kv, -1, per_head.shape[-1]).sum(1).T


def content_maps(planes: Planes, rho: Tensor, num_kv: int) -> Tensor:
    """Maps (H, d_h, G * d_h) from all keys to each head's content key, the mean over distances of the part without a plane.

    E_D[ key exp(-i D theta) - sum_j read_j z_j exp(-i D omega_j) ] in the half-split layout of `real_rows`.

    Args:
        planes: that keep their rotation.
        rho: (H, n_f) mean rotations.
        num_kv: kv heads G.
    """
    num_heads, n_f = rho.shape
    group = torch.arange(num_heads, device=rho.device) // (num_heads // num_kv)
    carried = planes.read * rho[:, planes.freq_index].T[:, None]
    maps = -torch.einsum("jfh,jeg->hfge", carried, planes.write)
    f = torch.arange(n_f, device=rho.device)
    maps[torch.arange(num_heads, device=rho.device)[:, None], f, group[:, None], f] += rho
    wide = real_matrix(maps.transpose(1, 2)).transpose(1, 2)
    return wide.reshape(num_heads, 2 * n_f, -1)
