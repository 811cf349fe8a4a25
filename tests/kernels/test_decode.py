"""The decode kernels, interpreted, against the float64 reference.

No bfloat16: Triton 3.6's interpreter multiplies its bit patterns as integers. benchmarks/kernels_gpu covers it on a GPU.
"""

import pytest
import torch
from cases import as_problem, disagreement, make_case

from mla_attention.decode import launch_decode
from mla_attention.tuning import DecodeConfig, choose_splits, default_config, rank_chunks, shared_memory

CONFIG = DecodeConfig(16, 16)


def decode(case, config, num_splits=0, softcap=0.0, window=None, mask=None):
    """Launch on outputs that are filled with NaN."""
    query = case["q_latent"]
    batch, tokens, heads, _ = query.shape
    out = torch.full_like(query, torch.nan)
    lse = torch.full((batch, heads, tokens), torch.nan)
    launch_decode(as_problem(case, out, lse, num_splits, softcap, window, mask), config)
    return out, lse


pytestmark = pytest.mark.usefixtures("triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rank", "rope_dim"), [(16, 0), (48, 16), (96, 48), (64, 32)])
def test_ragged_lengths(dtype, rank, rope_dim):
    case = make_case(4, 1, 5, rank, rope_dim, [33, 0, 1, 64], dtype)
    assert disagreement(*decode(case, CONFIG), case) is None


def test_a_program_attends_to_several_tiles():
    """A program's part is several tiles long and includes the end of a sequence."""
    case = make_case(4, 1, 3, 32, 16, [200, 0, 130, 3], torch.float32)
    assert disagreement(*decode(case, CONFIG), case) is None


def test_all_lengths_zero():
    case = make_case(2, 1, 3, 16, 16, [0, 0], torch.float16)
    out, lse = decode(case, CONFIG)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = decode(case, CONFIG, num_splits=2)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_paged_equals_contiguous(page_size):
    case = make_case(3, 1, 4, 32, 16, [37, 0, 50], torch.float32, page_size=page_size)
    out, lse = decode(case, CONFIG, num_splits=2)
    assert disagreement(out, lse, case) is None
    held = torch.where(case["block_table"] < case["latent_cache"].shape[0], case["block_table"], 0).long()
    flat = {name: case[name][held].flatten(1, 2) for name in ("latent_cache", "rope_cache")}
    same = decode({k: v for k, v in case.items() if k != "block_table"} | flat, CONFIG, num_splits=2)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])


@pytest.mark.parametrize("num_splits", [1, 3, 7])
def test_number_of_splits_changes_nothing_but_rounding(num_splits):
    case = make_case(2, 1, 3, 32, 16, [70, 5], torch.float32)
    out, lse = decode(case, CONFIG, num_splits=num_splits)
    assert disagreement(out, lse, case) is None
    one, lse_one = decode(case, CONFIG, num_splits=1)
    torch.testing.assert_close(out, one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, lse_one, atol=1e-6, rtol=1e-6)


def test_several_query_tokens_are_causal():
    case = make_case(3, 3, 7, 32, 16, [40, 2, 17], torch.float16)  # one sequence is shorter than its queries
    assert disagreement(*decode(case, CONFIG), case) is None


@pytest.mark.parametrize("window", [1, 9, 1000])
@pytest.mark.parametrize("num_splits", [0, 3])
def test_window(window, num_splits):
    case = make_case(2, 2, 3, 32, 16, [60, 21], torch.float32)
    assert disagreement(*decode(case, CONFIG, num_splits, window=window), case, window=window) is None


def test_softcap():
    case = make_case(2, 1, 3, 32, 16, [37, 20], torch.float32)
    case["softmax_scale"] = 1.0  # large enough scores that the cap matters
    assert disagreement(*decode(case, CONFIG, softcap=3.0), case, softcap=3.0) is None


def test_strided_inputs():
    """Caches are rows of a wider buffer with the sequence first, and queries are slices, as in a model."""
    case = make_case(2, 1, 4, 32, 16, [20, 33], torch.float32)
    for name in ("latent_cache", "rope_cache"):
        cache = case[name]
        wide = torch.full((cache.shape[1], cache.shape[0], 80), torch.nan)
        wide[..., : cache.shape[2]] = cache.transpose(0, 1)
        case[name] = wide[..., : cache.shape[2]].transpose(0, 1)
    query = torch.cat([case["q_rope"], case["q_latent"]], dim=-1)
    case["q_rope"], case["q_latent"] = query.split([16, 32], dim=-1)
    assert disagreement(*decode(case, CONFIG), case) is None


@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_masks(tokens, gaps, num_splits, page_size):
    """Left padding, a sequence without tokens, and optionally gaps; rows that no query sees are NaN."""
    lengths = [40, 64, 0, 33]
    case = make_case(4, tokens, 3, 32, 16, lengths, torch.float32, page_size=page_size, spare=24)
    capacity = case["latent_cache"].shape[1] if not page_size else page_size * case["block_table"].shape[1]
    limit = torch.tensor(lengths)[:, None] - tokens + 1 + torch.arange(tokens)
    mask = torch.arange(capacity) < limit[..., None]
    mask[0, :, :20] = False
    if not page_size:
        case["latent_cache"][0, :16] = torch.nan
    if gaps:
        mask[1, :, 30:50] = False
        mask[3, 0] = False
    del case["cache_seqlens"]
    out, lse = decode(case, CONFIG, num_splits, mask=mask)
    assert disagreement(out, lse, case, mask=mask) is None


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("hidden", ["padding", "window", "gap"])
def test_hidden_rows_may_be_nan(hidden, tokens):
    """Hidden rows of a tile that also has visible rows hold NaN: they are not loaded, rather than multiplied by zero."""
    case = make_case(2, tokens, 3, 32, 16, [40, 37], torch.float32)
    limit = torch.tensor([40, 37])[:, None] - tokens + 1 + torch.arange(tokens)
    mask = torch.arange(case["latent_cache"].shape[1]) < limit[..., None]
    rows = {"padding": slice(0, 5), "window": slice(0, 40 - tokens - 8), "gap": slice(10, 13)}[hidden]
    mask[0, :, rows] = False
    visible = {"window": 9} if hidden == "window" else {"mask": mask}
    if hidden != "window":
        del case["cache_seqlens"]
    clean = {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}
    for name in ("latent_cache", "rope_cache"):
        case[name][0, rows] = torch.nan
    out, lse = decode(case, CONFIG, **visible)
    assert out.isfinite().all()
    assert disagreement(out, lse, clean, **visible) is None
    assert disagreement(out, lse, case, **visible) is None


def test_more_rows_than_a_program_takes():
    case = make_case(2, 2, 11, 16, 16, [37, 20], torch.float32)
    assert disagreement(*decode(case, CONFIG), case) is None


@pytest.mark.parametrize(
    ("programs", "capacity", "paged", "splits"),
    [(32, 8192, False, 4), (32, 8192, True, 8), (1, 131072, False, 132), (1, 300, False, 4), (1, 0, False, 1),
     (132, 8192, False, 1), (186, 8192, False, 2), (133, 64, False, 1), (264, 8192, False, 1)],
)  # fmt: skip
def test_number_of_splits(programs, capacity, paged, splits):
    assert choose_splits(DecodeConfig(32, 32), 132, programs, capacity, paged) == splits


@pytest.mark.parametrize("rank", range(16, 1025, 16))
def test_default_configuration_fits(rank):
    first, second = rank_chunks(rank)
    assert rank <= first + second < rank * 4 / 3 + 1
    for rope_dim in (0, 64, 128):
        for rows in (1, 16, 33, 128):
            for dtype in (torch.bfloat16, torch.float32):
                config = default_config(rank, rope_dim, rows, dtype)
                assert shared_memory(config, rank, rope_dim, dtype.itemsize) <= 227 * 1024
