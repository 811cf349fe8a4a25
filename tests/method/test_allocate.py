"""Allocation of a cache budget to layers."""

import itertools
from dataclasses import replace

import pytest

from mla_convert.method.factorise.allocate import MAX_ROPE, LayerLoss, allocate, curve, most_rank, most_rope, probes
from mla_convert.method.factorise.sizes import CacheFormat, LayerSize, Plan
from mla_convert.source.shape import AttentionShape

SHAPE = AttentionShape(layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
PLAN = Plan(rank=20, rope_dim=8, shape=SHAPE)


def decay(scale, rate, sizes):
    return {size: scale * rate**size for size in sizes}


def losses(plan, unit, scales):
    ranks, ropes = probes(plan, unit)
    return [LayerLoss(decay(rank, 0.9, ranks), decay(rope, 0.8, ropes)) for rank, rope in scales]


def test_probes_are_sizes_that_a_layer_may_get():
    for plan, unit in ((PLAN, 2), (Plan(512, 64, AttentionShape(32, 4096, 32, 8, 128)), 16)):
        ranks, ropes = probes(plan, unit)
        assert ranks == sorted(set(ranks)) and ropes == sorted(set(ropes))
        assert ranks[-1] == plan.full_rank and plan.rank in ranks and plan.rope_dim in ropes
        assert ropes[0] == 0 and ropes[-1] == most_rope(plan, unit) < plan.shape.full_rope_dim
    assert ropes[-1] == MAX_ROPE


def test_curve_interpolates_the_measurements_and_is_convex():
    found = curve({2: 1.0, 6: 0.1, 12: 0.05}, 2, 12)
    assert len(found) == 7 and found[1] == 1.0 and found[3] == pytest.approx(0.1) and found[6] == pytest.approx(0.05)
    assert found[2] == pytest.approx(0.1**0.5)
    gains = [a - b for a, b in itertools.pairwise(found)]
    assert gains == sorted(gains, reverse=True)


def test_curve_of_noise_never_rises():
    found = curve({2: 1.0, 4: 1.2, 6: 0.3, 8: 0.31}, 2, 8)
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(found))
    assert curve({0: 0.5, 4: 0.2, 8: 0.2}, 4, 8, floor=0.2)[-1] < 1e-9


def test_equal_layers_get_equal_sizes_and_all_of_the_budget():
    sizes = allocate(PLAN, losses(PLAN, 2, [(1, 1)] * 3), 2, 1.0)
    assert len(set(sizes)) == 1 and sizes[0].width == PLAN.cache_width


def test_sensitive_layers_get_larger_sizes():
    sizes = allocate(PLAN, losses(PLAN, 2, [(0.1, 1), (1, 1), (10, 1)]), 2, 1.0)
    assert sum(size.width for size in sizes) == 3 * PLAN.cache_width
    assert sizes[0].rank < sizes[1].rank < sizes[2].rank
    sizes = allocate(PLAN, losses(PLAN, 2, [(1, 0.1), (1, 1), (1, 10)]), 2, 1.0)
    assert sizes[0].rope_dim < sizes[1].rope_dim < sizes[2].rope_dim


def test_greedy_is_optimal():
    found = losses(PLAN, 2, [(0.3, 1), (2, 0.5), (1, 3)])
    sizes = allocate(PLAN, found, 2, 1.0)
    floor = [loss.rank[PLAN.full_rank] for loss in found]
    ranks = [curve(loss.rank, 2, most_rank(PLAN, loss), floor[i]) for i, loss in enumerate(found)]
    ropes = [curve(loss.rope, 2, most_rope(PLAN, 2)) for loss in found]

    def total(choice):
        return sum(ranks[i][size.rank // 2] + ropes[i][size.rope_dim // 2] for i, size in enumerate(choice))

    best = total(sizes)
    # moving one unit from one layer to another never helps
    for (a, kind_a), (b, kind_b) in itertools.permutations(itertools.product(range(3), range(2)), 2):
        moved = [[size.rank, size.rope_dim] for size in sizes]
        moved[a][kind_a] -= 2
        moved[b][kind_b] += 2
        if moved[a][kind_a] >= 2 and moved[b][0] <= PLAN.full_rank and moved[b][1] <= most_rope(PLAN, 2):
            assert total([LayerSize(*size) for size in moved]) >= best - 1e-12


def test_rotary_losses_can_count_less():
    found = losses(PLAN, 2, [(1, 1)] * 3)
    assert allocate(PLAN, found, 2, 0.1)[0].rope_dim < allocate(PLAN, found, 2, 1.0)[0].rope_dim


@pytest.mark.parametrize("plan", [Plan(2, 0, SHAPE), Plan(2, 2, SHAPE), Plan(48, 14, SHAPE)])
def test_small_and_large_budgets(plan):
    sizes = allocate(plan, losses(plan, 2, [(1, 1), (5, 2), (0.1, 9)]), 2, 1.0)
    # a layer has at least one unit of each
    assert sum(size.width for size in sizes) <= 3 * max(plan.cache_width, 4)
    for size in sizes:
        assert 2 <= size.rank <= SHAPE.full_rank(size.rope_dim) and size.rope_dim < SHAPE.full_rope_dim


def test_a_layer_without_rope_gets_rank_only():
    found = losses(PLAN, 2, [(1, 1)] * 3)
    found[1] = LayerLoss({**found[1].rank, SHAPE.full_rank(0): 1e-9}, {0: 0.0})
    sizes = allocate(PLAN, found, 2, 1.0)
    assert sizes[1].rope_dim == 0 and sizes[1].rank >= sizes[0].rank > 0 < sizes[0].rope_dim
    assert sum(size.width for size in sizes) == 3 * PLAN.cache_width


def quantised(kind, **fields):
    return replace(PLAN, rank=64, rope_dim=16, cache=CacheFormat(kind, 64, "fp8"), shape=WIDE, **fields)


WIDE = AttentionShape(layers=3, hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=32)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "mixed"])
def test_bytes_of_packed_rows_are_the_budget(kind):
    plan = quantised(kind, budget=128)
    losses = [
        LayerLoss(
            {rank: weight * 2.0 ** (-rank / 32) for rank in (32, 64, 128, 192)},
            {rope: weight * 2.0 ** (-rope / 16) for rope in (0, 16, 32, 64)},
            {wide: weight * 0.1 * 2.0 ** (-wide / 16) for wide in (0, 32, 64)} if kind == "mixed" else {},
        )
        for weight in (1.0, 4.0, 0.25)
    ]
    sizes = allocate(plan, losses, 16, 1.0)
    held = [plan.cache.row_bytes(size) for size in sizes]
    assert 3 * 128 - 48 <= sum(held) <= 3 * 128 and held[1] > held[0] > held[2]
    assert all(size.wide <= size.rank and size.rank % plan.cache.units(16)[0] == 0 for size in sizes)
    assert any(size.wide for size in sizes) == (kind == "mixed")


def test_eight_bits_go_where_they_save_most():
    flat, steep = ({0: 1e-6, 32: 1e-6, 64: 1e-6}, {0: 1.0, 32: 0.1, 64: 0.0})
    losses = [LayerLoss({64: 1.0, 192: 0.9}, {16: 1.0, 32: 0.99}, wide) for wide in (flat, steep, flat)]
    sizes = allocate(quantised("mixed", budget=112), losses, 16, 1.0)
    assert sizes[1].wide >= 32 and sizes[0].wide == sizes[2].wide == 0


def test_a_budget_below_one_unit_of_each_kind_gives_equal_sizes():
    plan = replace(PLAN, rank=20, rope_dim=8)
    sizes = allocate(plan, losses(plan, 16, [(1, 1), (5, 2), (0.1, 9)]), 16, 1.0)
    assert sizes == (LayerSize(20, 8),) * 3


def test_no_rotary_dims_stay_none():
    plan = replace(PLAN, rope_dim=0)
    assert most_rope(plan, 2) == 0
    sizes = allocate(plan, losses(plan, 2, [(1, 1), (5, 2), (0.1, 9)]), 2, 1.0)
    assert all(size.rope_dim == 0 for size in sizes) and sum(size.rank for size in sizes) <= 3 * plan.rank
