"""Closed-form factorisation of one attention layer into multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434).

The keys that keep their rotation (rope.py) are written to the cache as they are. All else, the content keys and the values,
becomes one latent c = A [x; 1] of r elements, chosen so that the expected error of the attention output is least: a weighted
low-rank approximation, solved by the theorem of Eckart, Young and Mirsky after a change of basis. With W the metric of the
error on y = [keys; values] and C = L L^T the second moment of y, the best rank-r estimate of y is L E E^T L^-1 y, where E are
the r leading eigenvectors of L^T W L. Tokens that no query attends to may have any error, so C weights tokens by attention,
which matters more than any other part. DESIGN.md section 2.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_convert.core.errors import InputError
from mla_convert.method.calibrate.statistics import Statistics
from mla_convert.method.factorise import linalg, rope
from mla_convert.method.factorise.content import Content, narrowed
from mla_convert.method.factorise.linalg import COST_RIDGE, RIDGE, balance, ridged

__all__ = ["AttentionWeights", "Geometry", "MlaWeights", "factorise", "full_rank"]


@dataclass(frozen=True)
class AttentionWeights:
    """One layer of the source: H query heads, G kv heads, head size d_h, hidden size d; any float dtype.

    Rows of a head are in half-split order over all of d_h: dims without rotation are pairs of frequency zero. Where a norm
    makes queries and keys nonlinear in x, k and v act on another vector of some size d, and q on one of size d_q for each
    head; `Statistics` then hold the moments of those.
    """

    q: Tensor  # (H*d_h, d), or (H*d_h, d_q)
    k: Tensor  # (G*d_h, d)
    v: Tensor  # (G*d_h, d)
    o: Tensor  # (d, H*d_h)
    q_bias: Tensor | None = None  # (H*d_h,)
    k_bias: Tensor | None = None  # (G*d_h,)
    v_bias: Tensor | None = None  # (G*d_h,)
    o_bias: Tensor | None = None  # (d,)


@dataclass(frozen=True)
class Geometry:
    """Head counts and scales of the source's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float  # factor of the logits before softmax
    rope_scale: float = 1.0  # factor of cos and sin (yarn, longrope); rotary logits get it squared
    num_rotary_freqs: int | None = None  # number of RoPE's frequencies, the first ones; None: all d_h/2
    # (2, d_h/2) factors of the real and the imaginary part of each plane's logit after RoPE, where norms with weights follow it
    plane_weights: Tensor | None = None


@dataclass(frozen=True)
class MlaWeights:
    """The converted layer in float64, rows in DeepSeek's order; rope: m real parts, then m imaginary ones."""

    q_proj: Tensor  # (H*(nope+2m), d or d_q): per head nope rows, then rope rows
    kv_a: Tensor  # (r+2m, d): latent rows, then k_rope rows
    kv_b: Tensor  # (H*(nope+d_h), r): per head k_nope rows, then value rows
    o_proj: Tensor  # (d, H*d_h)
    q_bias: Tensor | None  # present when the source has a q bias
    kv_a_bias: Tensor | None  # present when the source has a k or v bias
    o_bias: Tensor | None  # present when the source has an o bias
    freq_index: Tensor  # (m,) int64, frequency of each rotary plane
    energy: dict[str, float]  # kept energy and errors of the approximation, see `_energy`
    channel_variance: Tensor  # (r,) second moment of each channel of the latent, on tokens weighted by attention
    channel_cost: Tensor  # (r,) cost of a squared error of one in each channel
    rope_variance: Tensor  # (2m,) as channel_variance, of the rotary key, mean of the two dims of a plane
    rope_cost: Tensor  # (2m,) as channel_cost, likewise
    num_heads: int
    rope_weight: Tensor | None = None  # (2m,) `Geometry.plane_weights` of the planes that are kept


def full_rank(geometry: Geometry, hidden_size: int, rope_dim: int, has_kv_bias: bool) -> int:
    """Largest useful kv_lora_rank: the rank of [content keys; values] as a function of the input."""
    rows = 2 * geometry.num_kv_heads * geometry.head_dim - rope_dim
    return min(rows, hidden_size + int(has_kv_bias))


def _affine(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[weight, bias] (n, d+1) in float64, a missing bias being zero."""
    column = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.cat((weight, column.to(weight)[:, None]), 1).double()


def _logit_cost(v: Tensor, o_heads: Tensor, moment: Tensor) -> Tensor:
    """(H,) output error caused by a squared error of one in each head's logits.

    A logit error of head h changes the output by about W_o,h (v - E v): the cost is the energy of that.

    Args:
        v: (G, d_h, d+1).
        o_heads: (H, d, d_h).
        moment: (d+1, d+1) second moment of the input of v.
    """
    mean = moment[:, -1]
    spread = v @ (moment - torch.outer(mean, mean)) @ v.mT
    spread = spread.repeat_interleave(len(o_heads) // len(v), 0)
    return ((o_heads @ spread) * o_heads).sum((1, 2))


def _key_cost(q: Tensor, query_moment: Tensor, logit_cost: Tensor) -> Tensor:
    """(H, d_h, d_h) output error caused by an error of each head's key: that of its logits, times E[q_h q_h^T].

    Args:
        q: (H, d_h, d+1).
        query_moment: (d+1, d+1) second moment of the input of q, or one for each head.
        logit_cost: (H,), from `_logit_cost`.
    """
    return ridged(q @ query_moment @ q.mT, COST_RIDGE) * logit_cost[:, None, None]


def _rope_moments(
    k_rope: Tensor, q_rope: Tensor, tokens: Tensor, query_moment: Tensor, cost: Tensor
) -> tuple[Tensor, Tensor]:
    """Second moment of each number of the rotary key (2m,), and the cost of its errors; RoPE turns the two dims of a plane.

    Args:
        k_rope: (2m, d+1).
        q_rope: (H, 2m, d+1).
        tokens: (d+1, d+1) second moment of the input of keys.
        query_moment: the same of that of queries, or one for each head.
        cost: of errors of logits (H,).
    """
    variance = ((k_rope @ tokens) * k_rope).sum(-1)
    costs = (((q_rope @ query_moment) * q_rope).sum(-1) * cost[:, None]).sum(0)
    variance, costs = (part.view(2, -1).mean(0).repeat(2) for part in (variance, costs))
    return variance, costs


def _choose(
    k: Tensor,
    tokens: Tensor,
    key_cost: Tensor,
    rho: Tensor,
    count: int,
    planes: str,
    num_rotary_freqs: int,
    real: bool = False,
) -> rope.Planes:
    """Rotary planes of a layer.

    Args:
        k: affine key rows (G*d_h, d+1).
        tokens: (d+1, d+1) second moment of the input, weighted by attention.
        key_cost: (H, d_h, d_h) from `_key_cost`.
        rho: (H, n_f) mean rotations.
        count: planes to keep.
        planes: see `factorise`.
        num_rotary_freqs: see `Geometry`; the other frequencies are not candidates.
        real: planes are real combinations of heads, which weights of real and imaginary parts commute with.
    """
    keys = rope.complex_rows(k, 2 * rho.shape[1])
    key_cov = keys @ tokens.to(keys.dtype) @ keys.mH
    key_cov = key_cov.real if real else key_cov
    query_energy = key_cost.diagonal(dim1=-2, dim2=-1).view(len(rho), 2, -1).sum(1)
    choose = {
        "by_loss": rope.choose_planes,
        "engine_table": rope.table_planes,
        "evenly_spaced": rope.even_planes,
    }[planes]
    if num_rotary_freqs == rho.shape[1]:
        return choose(key_cov, query_energy, rho, count)
    still = key_cov[num_rotary_freqs:].diagonal(dim1=-2, dim2=-1).real * rope.by_group(
        query_energy[:, num_rotary_freqs:], keys.shape[1]
    )
    if not num_rotary_freqs:
        none = keys.new_zeros(0, rho.shape[1], 1)
        index = torch.zeros(0, dtype=torch.int64, device=rho.device)
        wide = (none.expand(-1, -1, heads) for heads in (keys.shape[1], len(rho)))
        return rope.Planes(index, *wide, still.new_zeros(()), still.sum())
    kept = choose(key_cov[:num_rotary_freqs], query_energy[:, :num_rotary_freqs], rho[:, :num_rotary_freqs], count)
    # (m, frequencies, heads): planes neither write nor read the other frequencies
    wide = (F.pad(part, (0, 0, 0, rho.shape[1] - num_rotary_freqs)) for part in (kept.write, kept.read))
    return rope.Planes(kept.freq_index, *wide, kept.lost, kept.total + still.sum())


def _rope_rows(planes: rope.Planes, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """k_rope rows (2m, d+1) and q_rope rows (H, 2m, d+1) of equal mean square, real parts first."""
    n_f = planes.write.shape[1]
    keys, queries = rope.complex_rows(k, 2 * n_f), rope.complex_rows(q, 2 * n_f)
    key = torch.einsum("jfg,fgn->jn", planes.write, keys)
    query = torch.einsum("jfh,fhn->hjn", planes.read.conj(), queries)
    size = balance(query.abs().square().mean((0, 2)), key.abs().square().mean(1))[:, None]
    key, query = key * size, query / size
    return torch.cat((key.real, key.imag)), torch.cat((query.real, query.imag), 1)


def _reads(k_maps: Tensor, num_kv: int) -> tuple[Tensor, Tensor]:
    """Maps from y = [keys; values] to the content keys (H, nope, n) and the values (H, d_h, n) of every head.

    Args:
        k_maps: (H, nope, G*d_h) from all keys to the content key of each head.
        num_kv: kv heads G.
    """
    heads, _, width = k_maps.shape
    picks = torch.eye(width, dtype=k_maps.dtype, device=k_maps.device).view(num_kv, -1, width)
    picks = picks.repeat_interleave(heads // num_kv, 0)
    return torch.cat((k_maps, torch.zeros_like(k_maps)), -1), torch.cat((torch.zeros_like(picks), picks), -1)


def _metric(reads: Tensor, cost: Tensor) -> Tensor:
    """Sum over heads of reads_h^T cost_h reads_h: (H, a, n) and (H, a, a) to (n, n)."""
    flat = reads.flatten(0, 1)
    return flat.T @ (cost @ reads).flatten(0, 1)


def _cholesky(cov: Tensor) -> Tensor:
    """Lower factor of a covariance; a rank-deficient one, as from little text, gets a ridge that is just large enough.

    Raises:
        InputError: it is not finite.
    """
    ridge = RIDGE
    while ridge < 1:
        factor, failed = torch.linalg.cholesky_ex(ridged(cov, ridge))
        if not failed:
            return factor
        ridge *= 10
    raise InputError("the model's hidden states on the calibration text are not finite: try other --calib text")


def _latent(cov: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best rank-r latent of y under the error e^T metric e (Eckart-Young-Mirsky in the metric's basis).

    Args:
        cov: E[y y^T] (n, n).
        metric: (n, n), positive semidefinite.
        rank: r.

    Returns:
        encode (r, n), decode (n, r), tail (n, n - r) with E[error error^T] = tail tail^T, and the cost (r,) of an error of
        one in each element of the latent, whose variances are one.
    """
    factor = _cholesky(cov)
    values, vectors = (part.flip(-1) for part in linalg.eigh(factor.T @ metric @ factor))
    lead = vectors[:, :rank]
    encode = torch.linalg.solve_triangular(factor.T, lead, upper=True).T
    return encode, factor @ lead, factor @ vectors[:, rank:], values[:rank].clamp_min(0)


def _energy(
    planes: rope.Planes, gain: float, content: Content, cov: Tensor, tail: Tensor, metrics: tuple
) -> dict[str, float]:
    """Energy that each step keeps, as fractions, and the relative errors that remain if errors of keys are independent.

    Args:
        planes: that keep their rotation.
        gain: factor of squared rotary logits.
        content: of the heads.
        cov: see `_latent`.
        tail: see `_latent`.
        metrics: of keys and of values.
    """
    rope_lost, rope_total = float(planes.lost) * gain, float(planes.total) * gain
    key_total, value_total = (float((m * cov).sum()) for m in metrics)
    key_lost, value_lost = (max(0.0, float((tail * (m @ tail)).sum())) for m in metrics)
    # A total that is no more than rounding, as in a layer of zero weights, counts as not lost.
    least = torch.finfo(torch.float64).eps * (rope_total + key_total + value_total)

    def fraction(lost: float, total: float) -> float:
        return lost / total if total > least else 0.0

    logits_lost = rope_lost + content.lost + key_lost
    narrow = {} if content.total is None else {"nope_kept": 1 - fraction(content.lost, content.total)}
    return {
        "rope_kept": 1 - fraction(rope_lost, rope_total),
        **narrow,
        "rank_kept": 1 - fraction(key_lost + value_lost, key_total + value_total),
        "logit_error": fraction(logits_lost, rope_total) ** 0.5,
        "value_error": fraction(value_lost, value_total) ** 0.5,
        "output_error": fraction(logits_lost + value_lost, value_total) ** 0.5,
    }


def _content(
    rows: Tensor, tokens: Tensor, reads: tuple[Tensor, Tensor], costs: tuple[Tensor, Tensor], rank: int | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple]:
    """The joint low-rank factorisation of content keys and values.

    Args:
        rows: [keys; values] (n, c) as functions of c input columns.
        tokens: (c, c) second moment of the input.
        reads: from `_reads`.
        costs: of errors of keys (H, nope, nope) and of values (H, d_h, d_h).
        rank: r; None keeps the latent whole.

    Returns:
        Latent rows (r, c), kv_b (H*(nope+d_h), r), variances and costs of the channels (r,), and (cov, tail, metrics) for
        `_energy`.
    """
    metrics = tuple(_metric(read, cost) for read, cost in zip(reads, costs, strict=True))
    served = torch.cat(reads, 1).flatten(0, 1)
    if reads[0].shape[1] == 0:  # no content keys: keys must not compete for directions of y
        half = len(rows) // 2
        rows, served, metrics = rows[half:], served[:, half:], tuple(m[half:, half:] for m in metrics)
    if len(rows) > rows.shape[1]:  # the input is smaller than its keys and values: factorise it instead
        served, metrics = served @ rows, tuple(rows.T @ m @ rows for m in metrics)
        rows = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    cov = rows @ tokens @ rows.T
    if rank is None:
        channels = cov.diagonal(), (metrics[0] + metrics[1]).diagonal()
        return rows, served, channels, (cov, cov.new_zeros(len(cov), 0), metrics)
    encode, decode, tail, cost = _latent(cov, metrics[0] + metrics[1], rank)
    down, up = encode @ rows, served @ decode
    size = balance(up.square().mean(0), down.square().mean(1))
    return down * size[:, None], up / size, (size.square(), cost / size.square()), (cov, tail, metrics)


def _assemble(
    weights: AttentionWeights, q_rows: Tensor, kv_a: Tensor, kv_b: Tensor, freq_index: Tensor, energy: dict[str, float],
    channels: tuple[Tensor, ...], heads: int,
) -> MlaWeights:  # fmt: skip
    """MlaWeights from affine q rows (*, d+1) and kv_a rows (*, d), or (*, d+1) where k or v has a bias."""
    hidden, query_size = weights.k.shape[1], weights.q.shape[1]
    return MlaWeights(
        q_proj=q_rows[:, :query_size].contiguous(),
        kv_a=kv_a[:, :hidden].contiguous(),
        kv_b=kv_b,
        o_proj=weights.o.double(),
        q_bias=None if weights.q_bias is None else q_rows[:, query_size].contiguous(),
        kv_a_bias=kv_a[:, hidden].contiguous() if kv_a.shape[1] > hidden else None,
        o_bias=None if weights.o_bias is None else weights.o_bias.double(),
        freq_index=freq_index,
        energy=energy,
        channel_variance=channels[0],
        channel_cost=channels[1],
        rope_variance=channels[2],
        rope_cost=channels[3],
        num_heads=heads,
    )


def _moments(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Second moments (d+1, d+1) of the inputs: over tokens, for queries; weighted by attention, for keys and values."""
    moment = statistics.second_moment.double()
    tokens = moment if statistics.key_moment is None else statistics.key_moment.double()
    return moment, ridged(tokens / tokens[-1, -1], RIDGE)


def factorise(
    weights: AttentionWeights,
    geometry: Geometry,
    statistics: Statistics,
    rank: int | None,
    rope_dim: int,
    *,
    planes: str = "by_loss",
    nope_dim: int | None = None,
) -> MlaWeights:
    """Convert one layer to MLA.

    The elements of a latent are ordered: the first r rows of a higher rank are those of rank r.

    Args:
        weights: of the source's attention.
        geometry: of the source's attention.
        statistics: of its inputs.
        rank: kv_lora_rank; None leaves the latent whole and unordered: all keys and values, or the input where it is smaller.
        rope_dim: qk_rope_head_dim, even.
        planes: "by_loss" keeps the planes whose de-rotation costs most and damps the rest by the mean rotation;
            "engine_table" does so with at most one plane for each frequency of a table that serving engines can express;
            "evenly_spaced" keeps the best plane of evenly spaced frequencies and damps nothing (as TransMLA does).
        nope_dim: content dims of a head at most (content.py); None: d_h.

    Returns:
        Weights in float64, with the kept energy and the errors of the approximation.
    """
    heads, num_kv, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    q, k, v = (_affine(getattr(weights, n), getattr(weights, n + "_bias")) for n in "qkv")
    q_heads, v_heads = q.view(heads, head_dim, -1), v.view(num_kv, head_dim, -1)
    o_heads = weights.o.double().view(-1, heads, head_dim).transpose(0, 1)
    if statistics.gate is not None:  # an error of a value that the gate closes costs nothing
        o_heads = o_heads * statistics.gate.double().view(heads, 1, head_dim)
    moment, tokens = _moments(statistics)
    query_moment = moment if statistics.query_moment is None else statistics.query_moment.double()
    rho = rope.mean_rotation(statistics.distance.double(), statistics.inv_freq.double())
    num_rotary_freqs = rho.shape[1] if geometry.num_rotary_freqs is None else geometry.num_rotary_freqs
    if planes == "evenly_spaced":
        rho = torch.ones_like(rho)
    logit_cost = geometry.scaling**2 * _logit_cost(v_heads, o_heads, moment)
    key_cost = _key_cost(q_heads, query_moment, logit_cost)
    weighted = geometry.plane_weights is not None
    kept = _choose(k, tokens, key_cost, rho, rope_dim // 2, planes, num_rotary_freqs, real=weighted)
    nope = head_dim if rope_dim < num_kv * head_dim else 0
    gain = torch.ones(2, rho.shape[1], 1, dtype=torch.float64, device=rho.device)
    gain[:, :num_rotary_freqs] = geometry.rope_scale**2
    if weighted:  # the part of a logit that depends on the distance alone; the rest turns with the sum of the positions
        gain *= geometry.plane_weights.double().mean(0)[:, None]
    k_maps = (rope.content_maps(kept, rho, num_kv) * gain.flatten(0, 1))[:, :nope]
    content = narrowed(Content(q_heads[:, :nope], k_maps, key_cost[:, :nope, :nope]), k, tokens, nope_dim)
    costs = (content.cost, ridged(o_heads.mT @ o_heads, COST_RIDGE))
    # Without a source bias the result has none, and no column for constants.
    columns = slice(None if weights.k_bias is not None or weights.v_bias is not None else -1)
    rows = torch.cat((k, v))[:, columns]
    down, up, channels, lost = _content(rows, tokens[columns, columns], _reads(content.key_maps, num_kv), costs, rank)
    k_rope, q_rope = _rope_rows(kept, k, q)
    q_rows = torch.cat((content.query, q_rope), 1).flatten(0, 1)
    energy = _energy(kept, geometry.rope_scale**4, content, *lost)
    kv_a = torch.cat((down, k_rope[:, columns]))
    channels += _rope_moments(k_rope, q_rope, tokens, query_moment, logit_cost)
    whole = _assemble(weights, q_rows, kv_a, up, kept.freq_index, energy, channels, heads)
    return replace(whole, rope_weight=geometry.plane_weights[:, kept.freq_index].flatten()) if weighted else whole
