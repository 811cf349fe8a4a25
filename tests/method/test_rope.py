"""The complex view of RoPE: layouts, mean rotations, planes and content maps."""

import pytest
import torch

from mla_convert.method.factorise import rope
from mla_convert.method.factorise.sizes import table_frequencies

N_F, KV, HEADS = 4, 2, 6
INV_FREQ = 10.0 ** -torch.arange(N_F, dtype=torch.float64)


@pytest.fixture
def spectrum():
    """Random key covariance (n_f, G, G), query energy (H, n_f) and distances (H, T)."""
    torch.manual_seed(0)
    samples = torch.randn(N_F, KV, 50, dtype=torch.complex128)
    distance = torch.softmax(torch.randn(HEADS, 9, dtype=torch.float64), -1)
    return samples @ samples.mH / 50, torch.rand(HEADS, N_F, dtype=torch.float64) + 0.1, distance


def test_complex_and_real_rows_are_inverse():
    rows = torch.randn(KV * 2 * N_F, 5, dtype=torch.float64)
    assert torch.equal(rope.real_rows(rope.complex_rows(rows, 2 * N_F)), rows)


def test_real_matrix_multiplies_like_the_complex_one():
    linear, z = torch.randn(3, 4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)
    want = linear @ z
    got = rope.real_matrix(linear) @ torch.cat((z.real, z.imag))
    torch.testing.assert_close(got, torch.cat((want.real, want.imag)))


def test_mean_rotation_of_one_distance_is_that_rotation():
    distance = torch.zeros(1, 6, dtype=torch.float64)
    distance[0, 3] = 1
    want = torch.exp(-3j * INV_FREQ)
    torch.testing.assert_close(rope.mean_rotation(distance, INV_FREQ)[0], want)


def test_harmonic_distance_sums_to_one():
    mass = rope.harmonic_distance(HEADS, 100)
    torch.testing.assert_close(mass.sum(1), torch.ones(HEADS, dtype=torch.float64))


@pytest.mark.parametrize("choose", [rope.choose_planes, rope.even_planes])
@pytest.mark.parametrize("count", [0, 3, 5, N_F * KV])
def test_planes_have_increasing_distinct_indices_and_report_their_loss(choose, count, spectrum):
    key_cov, energy, distance = spectrum
    rho = rope.mean_rotation(distance, INV_FREQ)
    planes = choose(key_cov, energy, rho, count)
    assert planes.freq_index.tolist() == sorted(planes.freq_index.tolist())
    assert len(planes.freq_index) == count
    group = torch.eye(KV, dtype=torch.complex128).repeat_interleave(HEADS // KV, 0)
    left = group.repeat(N_F, 1, 1)
    for f, write, read in zip(planes.freq_index, planes.write, planes.read, strict=True):
        left[f] -= torch.outer(read[f], write[f])
    power = (left @ key_cov * left.conj()).sum(-1).real.T
    want = (power * energy * (1 - rho.abs() ** 2)).sum()
    torch.testing.assert_close(planes.lost, want, rtol=1e-9, atol=1e-12)
    assert (count == N_F * KV) == bool(planes.lost < 1e-12)


def test_choose_planes_loses_no_more_than_even_planes(spectrum):
    key_cov, energy, distance = spectrum
    rho = rope.mean_rotation(distance, INV_FREQ)
    for count in range(1, N_F * KV):
        assert rope.choose_planes(key_cov, energy, rho, count).lost <= rope.even_planes(
            key_cov, energy, rho, count
        ).lost * (1 + 1e-9)


@pytest.mark.parametrize("count", [0, 1, N_F])
def test_table_planes_are_the_best_with_one_frequency_each(count, spectrum):
    key_cov, energy, distance = spectrum
    rho = rope.mean_rotation(distance, INV_FREQ)
    planes = rope.table_planes(key_cov, energy, rho, count)
    assert len(planes.freq_index) == len(set(planes.freq_index.tolist())) == count
    free = rope.choose_planes(key_cov, energy, rho, count)
    assert free.lost <= planes.lost <= rope.even_planes(key_cov, energy, rho, count).lost
    if count == 1:  # the best of all planes
        assert torch.equal(free.freq_index, planes.freq_index) and torch.isclose(free.lost, planes.lost)


def test_a_table_has_frequencies_in_even_steps():
    assert table_frequencies(64) == range(0, 64, 2) and table_frequencies(32) == range(32)
    assert table_frequencies(48) == range(32) and table_frequencies(4) == range(4) and not table_frequencies(0)


def test_content_maps_give_the_mean_of_the_part_without_planes(spectrum):
    key_cov, energy, distance = spectrum
    rho = rope.mean_rotation(distance, INV_FREQ)
    planes = rope.choose_planes(key_cov, energy, rho, 3)
    keys = torch.randn(N_F, KV, dtype=torch.complex128)
    z = torch.einsum("jfg,fg->j", planes.write, keys)
    want = []
    for h in range(HEADS):
        back = torch.einsum("jf,j->jf", planes.read[:, :, h], z)
        mean = torch.zeros(N_F, dtype=torch.complex128)
        for step, mass in enumerate(distance[h]):
            turn = torch.exp(-1j * step * INV_FREQ)
            carried = (back * turn[planes.freq_index, None]).sum(0)
            mean += mass * (keys[:, h // (HEADS // KV)] * turn - carried)
        want.append(torch.cat((mean.real, mean.imag)))
    stacked = rope.real_rows(keys[..., None])[:, 0]
    torch.testing.assert_close(rope.content_maps(planes, rho, KV) @ stacked, torch.stack(want))


def test_nothing_is_left_as_content_when_every_plane_is_kept(spectrum):
    key_cov, energy, distance = spectrum
    rho = rope.mean_rotation(distance, INV_FREQ)
    planes = rope.choose_planes(key_cov, energy, rho, N_F * KV)
    assert rope.content_maps(planes, rho, KV).abs().max() < 1e-12
