"""The basis of a quantised latent: the same function, equal variances within a group."""

import dataclasses

import pytest
import torch

from mla_convert.method.factorise.basis import in_basis
from mla_convert.method.factorise.svd import MlaWeights
from mla_convert.modeling.latent_format_mla import LatentFormat, spreading


def weights(rank, rope_dim=4, hidden=96, bias=True):
    """Random weights whose channels have the variances and costs that they state, on inputs of identity covariance."""
    generator = torch.Generator().manual_seed(rank)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = torch.linalg.qr(random(hidden, rank))[0].T
    variance = torch.logspace(0, -2, rank, dtype=torch.float64)
    up = torch.linalg.qr(random(128, rank))[0] * torch.logspace(0.5, -1.5, rank, dtype=torch.float64)
    kv_a = torch.cat([rows * variance.sqrt()[:, None], random(rope_dim, hidden)])
    return MlaWeights(
        q_proj=random(8, hidden),
        kv_a=kv_a,
        kv_b=up,
        o_proj=random(hidden, 8),
        q_bias=None,
        kv_a_bias=random(len(kv_a)) if bias else None,
        o_bias=None,
        freq_index=torch.zeros(2, dtype=torch.int64),
        energy={},
        channel_variance=variance,
        channel_cost=up.square().sum(0),
        rope_variance=torch.linspace(4, 1, rope_dim // 2, dtype=torch.float64).repeat(2),
        rope_cost=torch.ones(rope_dim, dtype=torch.float64),
        num_heads=1,
    )


@pytest.mark.parametrize("size", [1, 2, 6, 16, 64, 80, 96])
def test_spreading_is_orthonormal(size):
    matrix = spreading(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    block = 1 << (size.bit_length() - 1)
    used = matrix[:block].abs().amax(0) > 0
    assert used.sum() == block and (matrix[:block, used].abs() - block**-0.5).abs().max() < 1e-12
    assert used[: size // 2].sum() == pytest.approx(block / 2, abs=2)  # channels of each half of the order


@pytest.mark.parametrize("basis", ["spread", "scaled", "pca"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_stays(basis, bias):
    given = weights(80, bias=bias)
    found = in_basis(given, LatentFormat("mixed", 80, 4, 32, 32), basis)
    torch.testing.assert_close(found.kv_b @ found.kv_a[:80], given.kv_b @ given.kv_a[:80])
    torch.testing.assert_close(found.kv_a[80:], given.kv_a[80:])
    if bias:
        torch.testing.assert_close(found.kv_b @ found.kv_a_bias[:80], given.kv_b @ given.kv_a_bias[:80])
        torch.testing.assert_close(found.kv_a_bias[80:], given.kv_a_bias[80:])


def test_a_section_has_equal_variances_and_equal_costs():
    """The cost of rounding is n mean(sqrt(w s))^2, less than that of channels that are not mixed."""
    given = weights(64, bias=False)
    found = in_basis(given, LatentFormat("int4", 64, 4, 32))
    variances, costs = found.kv_a[:64].square().sum(1), found.kv_b.square().sum(0)
    torch.testing.assert_close(variances, variances.mean().expand(64))
    torch.testing.assert_close(costs, costs.mean().expand(64))
    roots = (given.channel_variance * given.channel_cost).sqrt()
    torch.testing.assert_close((variances * costs).sum(), 64 * roots.mean().square())
    assert (variances * costs).sum() < 0.5 * roots.square().sum()


def test_a_rotary_key_in_4_bits_is_scaled_plane_by_plane():
    given = weights(64, rope_dim=4)
    found = in_basis(given, LatentFormat("int4", 64, 4, 32, rope="int4"))
    factors = found.kv_a[64:, 0] / given.kv_a[64:, 0]
    torch.testing.assert_close(factors[:2], factors[2:])
    assert factors[1] / factors[0] == pytest.approx(2**0.5)
    torch.testing.assert_close(found.q_proj[-4:] * factors[:, None], given.q_proj[-4:])
    torch.testing.assert_close(found.q_proj[:-4], given.q_proj[:-4])
    torch.testing.assert_close(found.kv_a_bias[64:] / factors, given.kv_a_bias[64:])
    # numbers of the key and of the latent may share a scale
    level = found.kv_a[:64].square().sum(1).mean()
    torch.testing.assert_close((given.rope_variance * factors.square()).mean(), level)


@pytest.mark.parametrize("row", [None, LatentFormat("fp8", 64, 4)])
def test_nothing_changes_without_a_need(row):
    given = weights(64)
    assert all(getattr(in_basis(given, row), f.name) is getattr(given, f.name) for f in dataclasses.fields(given))
