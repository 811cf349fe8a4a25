"""The decode kernels, interpreted, against the float64 reference.

No bfloat16: Triton 3.6's interpreter multiplies its bit patterns as integers. benchmarks/kernels_gpu covers it on a GPU.
"""

import pytest
import torch
from cases import disagreement, make_case

from mla_attention.decode import decode_triton
from mla_attention.tuning import DecodeConfig, default_config, rank_chunks, shared_memory

DIRECT, SWAPPED = DecodeConfig(16, 16), DecodeConfig(16, 16, swap=True)
BOTH = pytest.mark.parametrize("config", [DIRECT, SWAPPED], ids=["direct", "swapped"])


def decode(case, config, num_splits=0, softcap=0.0, window=None):
    """Launch on poisoned outputs."""
    query = case["q_latent"]
    batch, tokens, heads, _ = query.shape
    out = torch.full_like(query, torch.nan)
    lse = torch.full((batch, heads, tokens), torch.nan)
    decode_triton(
        query, case["q_rope"], case["latent_cache"], case["rope_cache"], case["cache_seqlens"], case.get("block_table"),
        case["softmax_scale"], num_splits, softcap, window or 0, out, lse, config,
    )  # fmt: skip
    return out, lse


pytestmark = pytest.mark.usefixtures("triton")


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rank", "rope_dim"), [(16, 0), (48, 16), (96, 48), (64, 32)])
def test_ragged_lengths(config, dtype, rank, rope_dim):
    case = make_case(4, 1, 5, rank, rope_dim, [33, 0, 1, 64], dtype)
    assert disagreement(*decode(case, config), case) is None


@BOTH
def test_long_walks(config):
    """A program's share of the work is several tiles, and goes over the end of a sequence."""
    case = make_case(4, 1, 3, 32, 16, [200, 0, 130, 3], torch.float32)
    assert disagreement(*decode(case, config), case) is None


@BOTH
def test_all_lengths_zero(config):
    case = make_case(2, 1, 3, 16, 16, [0, 0], torch.float16)
    out, lse = decode(case, config)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = decode(case, config, num_splits=2)
    assert (out == 0).all() and (lse == -torch.inf).all()


@BOTH
@pytest.mark.parametrize("page_size", [1, 8, 16, 48])
def test_paged_equals_contiguous(config, page_size):
    case = make_case(3, 1, 4, 32, 16, [37, 0, 50], torch.float32, page_size=page_size)
    out, lse = decode(case, config)
    assert disagreement(out, lse, case) is None
    held = torch.where(case["block_table"] < case["latent_cache"].shape[0], case["block_table"], 0).long()
    flat = {name: case[name][held].flatten(1, 2) for name in ("latent_cache", "rope_cache")}
    same = decode({k: v for k, v in case.items() if k != "block_table"} | flat, config)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


@BOTH
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
def test_number_of_splits_changes_nothing_but_rounding(config, num_splits):
    case = make_case(2, 1, 3, 32, 16, [70, 5], torch.float32)
    out, lse = decode(case, config, num_splits=num_splits)
    assert disagreement(out, lse, case) is None
    one, lse_one = decode(case, config, num_splits=1)
    torch.testing.assert_close(out, one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, lse_one, atol=1e-6, rtol=1e-6)


@BOTH
def test_several_query_tokens_are_causal(config):
    case = make_case(3, 3, 7, 32, 16, [40, 2, 17], torch.float16)  # one sequence is shorter than its queries
    assert disagreement(*decode(case, config), case) is None


@BOTH
@pytest.mark.parametrize("window", [1, 9, 1000])
@pytest.mark.parametrize("num_splits", [0, 3])
def test_window(config, window, num_splits):
    case = make_case(2, 2, 3, 32, 16, [60, 21], torch.float32)
    assert disagreement(*decode(case, config, num_splits, window=window), case, window=window) is None


@BOTH
def test_softcap(config):
    case = make_case(2, 1, 3, 32, 16, [37, 20], torch.float32)
    case["softmax_scale"] = 1.0  # large enough scores that the cap matters
    assert disagreement(*decode(case, config, softcap=3.0), case, softcap=3.0) is None


@BOTH
def test_strided_inputs(config):
    """Caches as rows of a wider buffer with the sequence first, queries as slices: what a model hands over."""
    case = make_case(2, 1, 4, 32, 16, [20, 33], torch.float32)
    for name in ("latent_cache", "rope_cache"):
        cache = case[name]
        wide = torch.full((cache.shape[1], cache.shape[0], 80), torch.nan)
        wide[..., : cache.shape[2]] = cache.transpose(0, 1)
        case[name] = wide[..., : cache.shape[2]].transpose(0, 1)
    query = torch.cat([case["q_rope"], case["q_latent"]], dim=-1)
    case["q_rope"], case["q_latent"] = query.split([16, 32], dim=-1)
    assert disagreement(*decode(case, config), case) is None


@pytest.mark.parametrize("page_size", [0, 32])
def test_tensor_memory_accelerator(page_size):
    config = DecodeConfig(16, 16, swap=True, tma=True)
    case = make_case(2, 1, 4, 48, 16, [37, 64], torch.float32, page_size=page_size)
    assert disagreement(*decode(case, config), case) is None


def test_more_rows_than_a_program_takes():
    case = make_case(2, 2, 11, 16, 16, [37, 20], torch.float32)
    assert disagreement(*decode(case, DIRECT), case) is None


def test_few_tiles_for_many_workers():
    case = make_case(1, 1, 2, 16, 16, [70], torch.float32)
    assert disagreement(*decode(case, DecodeConfig(16, 16, min_tiles=3)), case) is None


@pytest.mark.parametrize("rank", range(16, 577, 16))
def test_default_configuration_fits(rank):
    first, second = rank_chunks(rank)
    assert rank <= first + second < rank * 4 / 3 + 1
    for rope_dim in (0, 64, 128):
        for rows in (1, 16, 33, 128):
            for dtype in (torch.bfloat16, torch.float32):
                config = default_config(rank, rope_dim, rows, dtype)
                assert shared_memory(config, rank, rope_dim, dtype.itemsize) <= 227 * 1024
