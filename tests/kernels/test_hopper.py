"""The Hopper kernel on an emulator of Gluon, against the float64 reference.

Mostly float16: parts are combined in Triton's interpreter, which cuts bfloat16 off where it should round.
"""

import sys
from dataclasses import replace

import pytest
import torch
from cases import disagreement, make_case

from mla_attention import decode as launcher
from mla_attention.naive import mask_extent
from mla_attention.tuning import DecodeConfig

CONFIG = DecodeConfig(64, 64, hopper=True, stages=2)

pytestmark = pytest.mark.usefixtures("triton")


@pytest.fixture(autouse=True)
def on_the_emulator(triton, monkeypatch):
    from gluon_emulator import emulated

    import mla_attention

    name = "hopper_kernels"
    monkeypatch.setitem(sys.modules, f"mla_attention.{name}", emulated(name))
    monkeypatch.setattr(mla_attention, name, sys.modules[f"mla_attention.{name}"], raising=False)
    monkeypatch.setattr(launcher, "hopper_possible", lambda *_: True)


def decode(case, config=CONFIG, num_splits=0, softcap=0.0, window=None, **visible):
    query = case["q_latent"]
    batch, tokens, heads, _ = query.shape
    out = torch.full_like(query, torch.nan)
    lse = torch.full((batch, heads, tokens), torch.nan)
    launcher.decode_triton(
        query, case["q_rope"], case["latent_cache"], case["rope_cache"], case.get("cache_seqlens"), case.get("block_table"),
        case["softmax_scale"], num_splits, softcap, window or 0, out, lse, config, **visible,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize(("rank", "rope_dim"), [(16, 0), (96, 32), (320, 128), (576, 64)])
@pytest.mark.parametrize("block_n", [32, 64])
def test_ranks(rank, rope_dim, block_n):
    case = make_case(4, 1, 5, rank, rope_dim, [200, 0, 1, 131], torch.float16)
    assert disagreement(*decode(case, replace(CONFIG, block_n=block_n)), case) is None


def test_bfloat16():
    case = make_case(4, 1, 5, 64, 16, [20, 0, 1, 64], torch.bfloat16)
    assert disagreement(*decode(case), case) is None


@pytest.mark.parametrize("left", [1, 2, 3, 5])
def test_who_attends_what(left):
    case = make_case(2, 1, 3, 320, 16, [200, 70], torch.float16)
    assert disagreement(*decode(case, replace(CONFIG, left=left)), case) is None


@pytest.mark.parametrize(("stages", "per_sm", "min_tiles"), [(1, 1, 1), (3, 2, 1), (2, 1, 3), (7, 1, 1)])
def test_long_walks(stages, per_sm, min_tiles):
    """A program's share is many tiles, more than the ring holds, and goes over the ends of sequences."""
    config = replace(CONFIG, stages=stages, per_sm=per_sm, min_tiles=min_tiles)
    case = make_case(5, 1, 3, 128, 16, [900, 0, 130, 3, 1500], torch.float16)
    assert disagreement(*decode(case, config), case) is None


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_fixed_splits(num_splits):
    case = make_case(3, 1, 4, 64, 16, [300, 0, 65], torch.float16)
    assert disagreement(*decode(case, num_splits=num_splits), case) is None


@pytest.mark.parametrize("page_size", [64, 128])
def test_pages(page_size):
    case = make_case(3, 1, 4, 96, 16, [300, 0, 129], torch.float16, page_size=page_size)
    assert disagreement(*decode(case), case) is None


@pytest.mark.parametrize(("tokens", "heads"), [(3, 5), (4, 32), (1, 128)])
def test_rows(tokens, heads):
    """Several query tokens are causal; more rows than 64 are several programs'."""
    case = make_case(3, tokens, heads, 64, 16, [130, 2, 64], torch.float16)
    assert disagreement(*decode(case), case) is None


@pytest.mark.parametrize("options", [{"window": 70}, {"window": 1}, {"softcap": 2.0}, {"softcap": 2.0, "window": 100}])
def test_window_and_softcap(options):
    case = make_case(3, 2, 5, 96, 32, [330, 40, 64], torch.float16)
    assert disagreement(*decode(case, **options), case, **options) is None


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_masks(tokens, hole):
    lengths = [240, 64, 0, 133]
    case = make_case(4, tokens, 3, 64, 16, lengths, torch.float16, spare=24)
    own = torch.tensor(lengths)[:, None] - tokens + 1 + torch.arange(tokens)
    mask = torch.arange(case["latent_cache"].shape[1]) < own[..., None]
    mask[0, :, :90] = False
    if hole:
        mask[0, :, 130:150] = False
        mask[3, 0] = False
    case["latent_cache"][0, :64] = torch.nan  # whole tiles before the first that is seen are not read
    del case["cache_seqlens"]
    out, lse = decode(case, mask=mask, extent=mask_extent(mask))
    case["latent_cache"][0, :64] = 0
    assert disagreement(out, lse, case, mask=mask) is None


def test_strided_caches():
    """Latent and rotary key side by side in one row."""
    case = make_case(2, 1, 3, 64, 32, [100, 77], torch.float16)
    both = torch.cat([case["latent_cache"], case["rope_cache"]], dim=-1)
    case["latent_cache"], case["rope_cache"] = both[..., :64], both[..., 64:]
    assert disagreement(*decode(case), case) is None
