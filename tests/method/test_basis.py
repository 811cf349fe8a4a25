"""The basis of a quantised latent: the same function, equal variances within a group."""

import dataclasses

import pytest
import torch

from mla_convert.method.factorise.basis import hadamard, in_basis
from mla_convert.method.factorise.svd import MlaWeights
from mla_convert.modeling.quantised_latent_mla import LatentFormat


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
    )


@pytest.mark.parametrize("size", [1, 2, 6, 16, 64, 80])
def test_hadamard_is_orthonormal_and_spreads(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    block = 1 << (size.bit_length() - 1)
    assert (matrix[:block, :block].abs() - block**-0.5).abs().max() < 1e-12


@pytest.mark.parametrize("basis", ["hadamard", "scaled", "pca"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_stays(basis, bias):
    given = weights(80, bias=bias)
    found = in_basis(given, LatentFormat("mixed", 80, 4, 32, 32), basis)
    torch.testing.assert_close(found.kv_b @ found.kv_a[:80], given.kv_b @ given.kv_a[:80])
    torch.testing.assert_close(found.kv_a[80:], given.kv_a[80:])
    if bias:
        torch.testing.assert_close(found.kv_b @ found.kv_a_bias[:80], given.kv_b @ given.kv_a_bias[:80])
        torch.testing.assert_close(found.kv_a_bias[80:], given.kv_a_bias[80:])


def test_a_group_has_equal_variances_and_equal_costs():
    row = LatentFormat("int4", 64, 4, 32)
    found = in_basis(weights(64, bias=False), row)
    variances, costs = found.kv_a[:64].square().sum(1), found.kv_b.square().sum(0)
    for group in range(2):
        part = slice(32 * group, 32 * group + 32)
        torch.testing.assert_close(variances[part], variances[part].mean().expand(32))
        torch.testing.assert_close(costs[part], costs[part].mean().expand(32))


@pytest.mark.parametrize("row", [None, LatentFormat("fp8", 64, 4)])
def test_nothing_changes_without_a_need(row):
    given = weights(64)
    assert all(getattr(in_basis(given, row), f.name) is getattr(given, f.name) for f in dataclasses.fields(given))
