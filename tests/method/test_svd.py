"""Exactness and optimality of the closed-form factorisation, on tiny random layers in float64."""

import dataclasses

import pytest
import torch

from mla_convert.core.errors import InputError
from mla_convert.method.calibrate.statistics import Statistics
from mla_convert.method.factorise import linalg
from mla_convert.method.factorise.svd import AttentionWeights, Geometry, factorise, full_rank

HIDDEN, HEAD_DIM, LENGTH = 36, 8, 12


def make_layer(num_heads, num_kv, biased=False, rope_scale=1.0, seed=0):
    """A random layer, its geometry and statistics; calibration inputs have a mean and a wide spectrum."""
    torch.manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    query, kv = num_heads * HEAD_DIM, num_kv * HEAD_DIM
    sizes = {"q_bias": query, "k_bias": kv, "v_bias": kv, "o_bias": HIDDEN} if biased else {}
    biases = {name: normal(size) for name, size in sizes.items()}
    weights = AttentionWeights(
        normal(query, HIDDEN) / 6, normal(kv, HIDDEN) / 6, normal(kv, HIDDEN) / 6, normal(HIDDEN, query) / 6, **biases
    )
    geometry = Geometry(num_heads, num_kv, HEAD_DIM, HEAD_DIM**-0.5, rope_scale)
    x = normal(400, HIDDEN) * torch.linspace(0.1, 2, HIDDEN, dtype=torch.float64) + normal(HIDDEN)
    x = torch.cat((x, torch.ones(400, 1, dtype=torch.float64)), 1)
    distance = torch.softmax(normal(num_heads, LENGTH), -1)
    inv_freq = 100.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    return weights, geometry, Statistics(x.T @ x / 400, distance, inv_freq)


def project(x, weight, bias):
    """x (T, d) through a linear layer."""
    return x @ weight.T if bias is None else x @ weight.T + bias


def rotate(heads, inv_freq, scale=1.0):
    """RoPE of (T, heads, 2m) vectors whose real parts come first."""
    angle = torch.arange(heads.shape[0], dtype=heads.dtype)[:, None, None] * inv_freq
    cos, sin = angle.cos() * scale, angle.sin() * scale
    real, imag = heads.chunk(2, -1)
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), -1)


def attend(q, k, v, scaling):
    """Causal attention of (T, H, *) heads; returns logits (H, T, T) and output (T, H*d_h)."""
    logits = torch.einsum("shd,thd->hst", q, k) * scaling
    mask = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    probs = logits.masked_fill(mask, -torch.inf).softmax(-1)
    return logits.masked_fill(mask, 0), torch.einsum("hst,thd->shd", probs, v).flatten(1)


def original(x, w, g, s):
    """Reference GQA attention of the source."""
    q, k, v = (
        project(x, a, b).view(len(x), -1, HEAD_DIM) for a, b in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    )
    q, k = rotate(q, s.inv_freq, g.rope_scale), rotate(k, s.inv_freq, g.rope_scale)
    k, v = (t.repeat_interleave(g.num_heads // g.num_kv_heads, 1) for t in (k, v))
    logits, out = attend(q, k, v, g.scaling)
    return logits, project(out, w.o, w.o_bias)


def converted(x, m, g, s, rank, rope_dim):
    """Reference MLA attention of the result, as the interface defines it."""
    freq = s.inv_freq[m.freq_index]
    nope = m.q_proj.shape[0] // g.num_heads - rope_dim
    q = project(x, m.q_proj, m.q_bias).view(len(x), g.num_heads, -1)
    latent, k_rope = project(x, m.kv_a, m.kv_a_bias).split((rank, rope_dim), -1)
    k, v = (latent @ m.kv_b.T).view(len(x), g.num_heads, -1).split((nope, HEAD_DIM), -1)
    k_rope = rotate(k_rope[:, None], freq, g.rope_scale).expand(-1, g.num_heads, -1)
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], freq, g.rope_scale)), -1)
    logits, out = attend(q, torch.cat((k, k_rope), -1), v, g.scaling)
    return logits, project(out, m.o_proj, m.o_bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("heads, num_kv", [(4, 4), (6, 6), (6, 2), (9, 3), (3, 1)])
def test_all_planes_and_full_rank_reproduce_the_source(heads, num_kv, biased):
    weights, geometry, stats = make_layer(heads, num_kv, biased, rope_scale=1.3)
    rope_dim = num_kv * HEAD_DIM
    rank = full_rank(geometry, HIDDEN, rope_dim, biased)
    result = factorise(weights, geometry, stats, rank, rope_dim)
    x = 3 * torch.randn(LENGTH, HIDDEN, dtype=torch.float64)
    mla = converted(x, result, geometry, stats, rank, rope_dim)
    for got, want in zip(mla, original(x, weights, geometry, stats), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert result.energy["rope_kept"] == pytest.approx(1)
    assert all((b is not None) == biased for b in (result.q_bias, result.kv_a_bias, result.o_bias))


@pytest.mark.parametrize("planes", ["by_loss", "evenly_spaced"])
@pytest.mark.parametrize("heads, num_kv, rope_dim", [(6, 6, 8), (6, 2, 8), (9, 3, 6), (3, 1, 2), (3, 1, 0)])
def test_full_rank_is_exact_without_rotation(heads, num_kv, rope_dim, planes):
    weights, geometry, stats = make_layer(heads, num_kv, biased=True, rope_scale=1.3)
    stats = dataclasses.replace(stats, inv_freq=torch.zeros(HEAD_DIM // 2, dtype=torch.float64))
    rank = full_rank(geometry, HIDDEN, rope_dim, True)
    result = factorise(weights, geometry, stats, rank, rope_dim, planes=planes)
    x = 3 * torch.randn(LENGTH, HIDDEN, dtype=torch.float64)
    mla = converted(x, result, geometry, stats, rank, rope_dim)
    for got, want in zip(mla, original(x, weights, geometry, stats), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_more_rank_and_more_planes_lose_less():
    weights, geometry, stats = make_layer(6, 2)
    shares = [factorise(weights, geometry, stats, rank, 6).energy["rank_kept"] for rank in (4, 8, 16, 26)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    shares = [factorise(weights, geometry, stats, 8, dim).energy["rope_kept"] for dim in (0, 4, 8, 16)]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_a_source_without_biases_gives_none():
    weights, geometry, stats = make_layer(6, 2)
    result = factorise(weights, geometry, stats, 8, 4)
    assert result.q_bias is None and result.kv_a_bias is None and result.o_bias is None


def test_shapes_and_determinism():
    weights, geometry, stats = make_layer(9, 3)
    first, second = (factorise(weights, geometry, stats, 10, 6) for _ in range(2))
    assert first.q_proj.shape == (9 * (HEAD_DIM + 6), HIDDEN) and first.kv_a.shape == (16, HIDDEN)
    assert first.kv_b.shape == (9 * 2 * HEAD_DIM, 10) and first.freq_index.dtype == torch.int64
    for field in ("q_proj", "kv_a", "kv_b", "o_proj", "freq_index"):
        assert torch.equal(getattr(first, field), getattr(second, field))


def test_singular_statistics_stay_exact_for_unseen_inputs():
    weights, geometry, stats = make_layer(6, 2)
    one = torch.zeros(HIDDEN + 1, dtype=torch.float64)
    one[[0, -1]] = 1
    stats = dataclasses.replace(stats, second_moment=torch.outer(one, one))
    result = factorise(weights, geometry, stats, 16, 16)
    x = torch.randn(LENGTH, HIDDEN, dtype=torch.float64)
    mla = converted(x, result, geometry, stats, 16, 16)
    torch.testing.assert_close(mla[1], original(x, weights, geometry, stats)[1], rtol=1e-6, atol=1e-6)


def test_key_moment_moves_the_error_to_tokens_without_attention():
    weights, geometry, stats = make_layer(6, 2)
    seen = torch.randn(HIDDEN + 1, 10, dtype=torch.float64)
    focused = dataclasses.replace(stats, key_moment=seen @ seen.T)
    kept = [factorise(weights, geometry, s, 16, 6).energy["rank_kept"] for s in (stats, focused)]
    assert kept[1] > kept[0] and kept[1] == pytest.approx(1)


@pytest.mark.parametrize("seen", ["wide", "one direction"])
@pytest.mark.parametrize("rank", [10, None])
def test_as_many_content_dims_as_the_content_has_lose_nothing(rank, seen):
    """With one kv head, every rotary plane empties two of the eight dims."""
    weights, geometry, stats = make_layer(3, 1, biased=True)
    if seen == "one direction":
        one = torch.zeros(HIDDEN + 1, dtype=torch.float64)
        one[[0, -1]] = 1
        stats = dataclasses.replace(stats, second_moment=torch.outer(one, one))
        rank = None
    whole = factorise(weights, geometry, stats, rank, 2)
    narrow = factorise(weights, geometry, stats, rank, 2, nope_dim=6)
    assert narrow.q_proj.shape == (3 * (6 + 2), HIDDEN) and narrow.kv_b.shape[0] == 3 * (6 + HEAD_DIM)
    assert "nope_kept" not in whole.energy and narrow.energy["nope_kept"] == pytest.approx(1, abs=1e-9)
    x = 3 * torch.randn(LENGTH, HIDDEN, dtype=torch.float64)
    rank = whole.kv_b.shape[1]
    for got, want in zip(*(converted(x, m, geometry, stats, rank, 2) for m in (narrow, whole)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_error_of_fewer_content_dims_is_the_measured_one():
    weights, geometry, stats = make_layer(6, 2)
    x = torch.randn(400, HIDDEN, dtype=torch.float64)
    second = torch.nn.functional.pad(x, (0, 1), value=1.0)
    stats = dataclasses.replace(stats, second_moment=second.T @ second / 400)
    whole = factorise(weights, geometry, stats, None, 2)

    def content_logits(m, nope):
        q = (x @ m.q_proj.T).view(400, 6, -1)[..., :nope]
        k = (x @ m.kv_a[:-2].T @ m.kv_b.T).view(400, 6, -1)[..., :nope]
        return torch.einsum("shd,thd->hst", q, k)

    lost = []
    for nope in (2, 4, 6, 7):
        narrow = factorise(weights, geometry, stats, None, 2, nope_dim=nope)
        expected = 1 - narrow.energy["nope_kept"]
        missed = content_logits(narrow, nope) - content_logits(whole, HEAD_DIM)
        # heads have different costs: the share of each one is between the best and the worst
        shares = missed.square().mean((1, 2)) / content_logits(whole, HEAD_DIM).square().mean((1, 2))
        assert 0.99 * shares.min() <= expected <= 1.01 * shares.max()
        lost.append(expected)
    assert lost == sorted(lost, reverse=True) and 0 < lost[-1] < lost[0] < 1


def test_a_layer_whose_values_are_zero_can_be_narrowed():
    weights, geometry, stats = make_layer(6, 2)
    result = factorise(dataclasses.replace(weights, v=torch.zeros_like(weights.v)), geometry, stats, 8, 4, nope_dim=3)
    assert all(part.isfinite().all() for part in (result.q_proj, result.kv_a, result.kv_b))


def test_statistics_that_are_not_finite_are_refused():
    weights, geometry, statistics = make_layer(4, 2)
    broken = dataclasses.replace(statistics, second_moment=statistics.second_moment * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        factorise(weights, geometry, broken, 8, 4)


def test_eigenvectors_are_checked(monkeypatch):
    """A GPU's solver may return NaN without raising; the CPU's is used then."""
    matrix = torch.diag(torch.tensor([1.0, 2.0]))

    class Silent(torch.Tensor):
        is_cuda = True

    real = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg,
        "eigh",
        lambda m: (m, m * torch.nan) if isinstance(m, Silent) else real(m.as_subclass(torch.Tensor)),
    )
    monkeypatch.setattr(Silent, "cpu", lambda self: self.as_subclass(torch.Tensor), raising=False)
    values, vectors = linalg.eigh(matrix.as_subclass(Silent))
    assert values.tolist() == [1.0, 2.0] and vectors.isfinite().all()
