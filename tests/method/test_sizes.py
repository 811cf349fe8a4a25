"""Sizes of the converted cache, for every setting that determines them."""

import pytest

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import Settings
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.source.shape import AttentionShape

LLAMA_8B = AttentionShape(32, 4096, 32, 8, 128)
SMOLLM = AttentionShape(30, 576, 9, 3, 64)
QWEN = AttentionShape(24, 896, 14, 2, 64, has_kv_bias=True)
MHA = AttentionShape(32, 4096, 32, 32, 128)
PICO = AttentionShape(3, 48, 6, 2, 8)
SHAPES = [LLAMA_8B, SMOLLM, QWEN, MHA, PICO]


def sizes(shape, **settings):
    plan = make_plan(Settings(**settings), shape)
    return plan.rank, plan.rope_dim


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.25, 1 / 3, 0.5, 0.75, 1])
def test_ratio_is_met_from_below(shape, ratio):
    plan = make_plan(Settings(kv_ratio=ratio), shape)
    unit = 2 if shape is PICO else 16
    assert plan.rank > 0 and plan.rank <= shape.full_rank(plan.rope_dim)
    assert plan.rope_dim % 2 == 0 and 0 < plan.rope_dim <= min(64, shape.full_rope_dim)
    assert plan.cache_ratio <= ratio
    if plan.rank < shape.full_rank(plan.rope_dim):
        assert plan.cache_ratio > ratio - unit / shape.cache_width
        assert plan.rank % unit == plan.rope_dim % unit == 0


def test_half_is_the_default():
    assert sizes(SMOLLM) == sizes(SMOLLM, kv_ratio=0.5) == (144, 48)


@pytest.mark.parametrize("shape, rank, rope_dim", [(LLAMA_8B, 512, 64), (SMOLLM, 96, 32), (SMOLLM, 144, 48), (PICO, 10, 4),
                                                   (PICO, 1, 2), (PICO, 16, 6), (MHA, 4096, 64)])  # fmt: skip
def test_rope_dim_follows_the_rank(shape, rank, rope_dim):
    assert sizes(shape, rank=rank) == (rank, rope_dim)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_is_exact(shape):
    plan = make_plan(Settings(rank="full", rope_dim="full"), shape)
    assert plan.exact and plan.qk_nope_head_dim == 0
    assert plan.rope_dim == shape.num_kv_heads * shape.head_dim
    assert plan.rank == min(shape.num_kv_heads * shape.head_dim, shape.hidden_size + shape.has_kv_bias)


def test_full_rank_of_wide_heads_is_the_width_of_the_input():
    wide = AttentionShape(3, 48, 6, 6, 16)
    assert wide.full_rank(0) == 48 and AttentionShape(3, 48, 6, 6, 16, has_kv_bias=True).full_rank(0) == 49


@pytest.mark.parametrize("rope_dim", [0, 2, 16])
def test_given_sizes_are_used(rope_dim):
    plan = make_plan(Settings(rank=9, rope_dim=rope_dim), PICO)
    assert (plan.rank, plan.rope_dim, plan.cache_width) == (9, rope_dim, 9 + rope_dim)
    assert plan.cache_ratio == (9 + rope_dim) / 32 and not plan.exact
    assert plan.qk_nope_head_dim == (0 if rope_dim == 16 else 8)


@pytest.mark.parametrize("rope_dim", [0, 8, 16])
def test_largest_rank_is_full_rank(rope_dim):
    full = 32 - rope_dim
    assert sizes(PICO, rank=full, rope_dim=rope_dim) == sizes(PICO, rank="full", rope_dim=rope_dim) == (full, rope_dim)
    with pytest.raises(InputError, match=f"rank {full + 1} is above full rank: .* rank {full};"):
        make_plan(Settings(rank=full + 1, rope_dim=rope_dim), PICO)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4", "auto"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
def test_quantised_rows_fill_their_share_of_the_bytes(shape, kind, ratio):
    plan = make_plan(Settings(kv_ratio=ratio, cache_dtype=kind), shape)
    larger = make_plan(Settings(kv_ratio=ratio), shape)
    assert plan.cache_ratio <= ratio and plan.budget == ratio * 2 * shape.cache_width
    assert plan.rank >= larger.rank
    if plan.rank < plan.full_rank:
        assert plan.row_bytes > plan.budget - 64
    row = plan.cache.row(plan.layer(0))
    auto = "int4" if ratio < 0.35 else "mixed"
    assert (row.kind, row.row_bytes) == ({"auto": auto}.get(kind, kind), plan.row_bytes)
    rope = "int4" if ratio < 0.35 and kind in ("int4", "auto") else "fp8"
    assert plan.latent_cache["kind"] == row.kind and plan.latent_cache["rope"] == row.rope == rope
    assert row.group == (0 if kind == "fp8" else 48 if rope == "int4" else 64)


def test_auto_mixes_where_the_rotary_key_has_8_bits():
    assert make_plan(Settings(kv_ratio=0.25, cache_dtype="auto", cache_rope="fp8"), SHAPES[0]).cache.kind == "mixed"


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_rotary_key_in_4_bits_needs_codes_of_4_bits(kind):
    with pytest.raises(UsageError, match=f"give --cache-dtype int4 or auto, not {kind}"):
        make_plan(Settings(kv_ratio=0.5, cache_dtype=kind, cache_rope="int4"), SMOLLM)


def test_a_rotary_key_in_bfloat16_takes_twice_the_bytes():
    rows = {
        rope: make_plan(Settings(rank=224, rope_dim=96, cache_dtype="int4", cache_rope=rope), SMOLLM).row_bytes
        for rope in ("bf16", "fp8", "int8", "int4")
    }
    assert rows == {"fp8": 112 + 96 + 16, "int8": 112 + 96 + 16, "bf16": 112 + 192 + 16, "int4": 112 + 48 + 16}


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="less than the smallest row in int4"):
        make_plan(Settings(kv_ratio=0.25, cache_dtype="int4"), PICO)
    with pytest.raises(InputError, match="rank 7 is odd"):
        make_plan(Settings(rank=7, rope_dim=8, cache_dtype="int4"), PICO)


def test_content_dims_narrow_the_heads_of_layers_with_rope():
    assert make_plan(Settings(nope_dim=64), LLAMA_8B).qk_nope_head_dim == 64
    for whole in (None, "full", 128):
        assert make_plan(Settings(nope_dim=whole), LLAMA_8B) == make_plan(Settings(), LLAMA_8B)
    some = AttentionShape(4, 48, 6, 2, 8, rope_layers=(True, True, True, False))
    plan = make_plan(Settings(nope_dim=4), some)
    assert [plan.layer_nope_dim(layer) for layer in range(4)] == [4, 4, 4, 8]
    assert make_plan(Settings(rank="full", rope_dim="full", nope_dim=4), PICO).exact
    partial = AttentionShape(3, 48, 6, 2, 8, rotary_dim=4)
    exact = [make_plan(Settings(rank="full", rope_dim="full", nope_dim=n), partial).exact for n in (3, 4)]
    assert exact == [False, True]


@pytest.mark.parametrize("nope_dim", [0, -1, 129])
def test_content_dims_out_of_range_are_refused(nope_dim):
    with pytest.raises(InputError, match=f"nope_dim {nope_dim} is not from 1 to 128"):
        make_plan(Settings(nope_dim=nope_dim), LLAMA_8B)


@pytest.mark.parametrize("without", [{"rotary_dim": 0}, {"rope_layers": (False, False, False)}])
def test_content_dims_are_refused_without_rope(without):
    with pytest.raises(InputError, match="this model has no RoPE"):
        make_plan(Settings(nope_dim=4), AttentionShape(3, 48, 6, 2, 8, **without))
