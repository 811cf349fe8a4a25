"""Packed rows: their bytes, the public functions on the CPU, and the kernels in the interpreter.

No bfloat16 in the interpreter: Triton 3.6 multiplies its bit patterns as integers, and rounds to it towards zero.
"""

import pytest
import torch
from cases import as_problem, disagreement, make_case, pack_case

from mla_attention import RowFormat, find_mask_bounds, mla_decode, mla_write, naive_write, ops
from mla_attention.decode import launch_decode
from mla_attention.rows import naive_pack, naive_unpack
from mla_attention.tuning import DecodeConfig

CONFIG = DecodeConfig(16, 16)
# Rank, rope dimension and format: all codes, one scale or several, groups that do not divide a chunk, both rotary keys.
FORMATS = {
    "fp8": (64, 16, RowFormat(64, 1)),
    "fp8 groups": (96, 32, RowFormat(96, 1, 32, 1)),
    "int8": (48, 0, RowFormat(48, 0)),
    "int4": (64, 16, RowFormat(0, 0, 0, 1)),
    "int4 groups": (96, 16, RowFormat(0, 0, 32)),
    "int4 across": (80, 16, RowFormat(0, 0, 32, 1)),
    "mixed": (112, 16, RowFormat(16, 0, 64)),
}
formats = pytest.mark.parametrize(("rank", "rope_dim", "form"), FORMATS.values(), ids=FORMATS)


def decode(case, num_splits=0, **options):
    """Launch on outputs that are filled with NaN."""
    out = torch.full_like(case["q_latent"], torch.nan)
    lse = torch.full(out.shape[:1] + out.shape[2:0:-1], torch.nan)
    problem = as_problem(case, out, lse, num_splits, **options)
    problem.check()
    launch_decode(problem, CONFIG)
    return out, lse


def test_bytes_of_a_row():
    """Every section, byte by byte; a group's number of largest magnitude has code -8."""
    form = RowFormat(wide=16, float8=0, group=32, rope_float8=1)
    latent, rope = torch.zeros(80), torch.zeros(16)
    latent[3], latent[16], latent[17], latent[48], latent[79] = 127.0, -8.0, 3.0, 7.0, 16.0
    rope[0], rope[1] = 448.0, -1.0
    row = naive_pack(latent, rope, form)
    assert form.layout(80, 16) == (16, 48, 64, 1, 3, 80) and row.shape == (80,)
    bytes_ = row.tolist()
    assert bytes_[3] == 127 and bytes_[0] == 0
    assert bytes_[16] & 15 == 0  # -8
    assert bytes_[17] & 15 == 3 + 8
    assert bytes_[48:50] == torch.tensor([448.0, -1.0]).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert row[64:72].view(torch.float16).tolist() == [1.0, 1.0, -2.0, 1.0]
    restored, key = naive_unpack(row, 80, 16, form, torch.float64)
    assert restored[[3, 16, 17, 79]].tolist() == [127, -8, 3, 16] and key[:2].tolist() == [448, -1]


@formats
def test_error_of_a_row(rank, rope_dim, form):
    latent, rope = torch.randn(20, rank), torch.randn(20, rope_dim)
    latent[0] = 0
    restored, key = naive_unpack(naive_pack(latent, rope, form), rank, rope_dim, form, torch.float32)
    assert (restored - latent).square().mean() < (0.001 if form.wide == rank else 0.03) and not restored[0].any()
    assert (key - rope).square().sum() <= 0.002 * rope.square().sum()


@formats
def test_decode_on_the_cpu(rank, rope_dim, form):
    case = pack_case(make_case(3, 2, 5, rank, rope_dim, [20, 0, 33], torch.bfloat16, page_size=16), form)
    out, lse = mla_decode(**case, return_lse=True)
    assert disagreement(out, lse, case) is None


@formats
@pytest.mark.parametrize(("dtype", "page_size"), [(torch.float16, 0), (torch.float32, 8)], ids=str)
def test_kernel(triton, rank, rope_dim, form, dtype, page_size):
    """Several query tokens, ragged lengths, several parts; rows of no token have all bits set."""
    case = pack_case(make_case(4, 2, 3, rank, rope_dim, [37, 0, 1, 50], dtype, page_size), form)
    assert disagreement(*decode(case, 2), case) is None


@pytest.mark.parametrize("options", [{"window": 9}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("name", ["fp8", "int4 groups"])
def test_window_and_softcap(triton, name, options):
    rank, rope_dim, form = FORMATS[name]
    case = pack_case(make_case(2, 2, 3, rank, rope_dim, [60, 21], torch.float32), form)
    assert disagreement(*decode(case, **options), case, **options) is None


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", ["fp8", "int4", "mixed"])
def test_masks(triton, name, gaps):
    """Left padding and gaps; hidden rows have all bits set and are not read."""
    rank, rope_dim, form = FORMATS[name]
    lengths, tokens = [40, 64, 0, 33], 2
    case = pack_case(make_case(4, tokens, 3, rank, rope_dim, lengths, torch.float32), form)
    limit = torch.tensor(lengths)[:, None] - tokens + 1 + torch.arange(tokens)
    mask = torch.arange(case["latent_cache"].shape[1]) < limit[..., None]
    mask[0, :, :20] = False
    case["latent_cache"][0, :20] = 255
    if gaps:
        mask[1, :, 30:50] = False
        case["latent_cache"][1, 30:50] = 255
    del case["cache_seqlens"]
    assert bool(find_mask_bounds(mask)[2].any()) == gaps
    assert disagreement(*decode(case, 2, mask=mask), case, mask=mask) is None


def write_arguments(rank, rope_dim, page_size, dtype):
    generator = torch.Generator().manual_seed(1)
    batch, tokens, heads = 2, 3, 5
    angles = torch.rand(batch, tokens, rope_dim // 2, generator=generator) * 6
    compressed = torch.randn(batch, tokens, rank + rope_dim, generator=generator).to(dtype)
    compressed[0, 1] = 0
    query = torch.randn(batch, tokens, heads, rope_dim, generator=generator).to(dtype)
    table = torch.tensor([[3, 1, 2147480000], [0, 6, 5]], dtype=torch.int32)
    return {
        "latent": compressed[..., :rank], "k_rope": compressed[..., rank:], "q_rope": query, "cos": angles.cos(),
        "sin": angles.sin(), "positions": torch.tensor([[4, 5, 6], [11, 12, -1]], dtype=torch.int32),
        "block_table": table if page_size else None,
    }  # fmt: skip


@formats
@pytest.mark.parametrize("page_size", [0, 6])
def test_write_kernel(triton, rank, rope_dim, form, page_size):
    """Latents to the bit; rotary keys to the rounding of their rotation, which in bfloat16 the interpreter cuts off."""
    from mla_attention.write import write_triton

    arguments = write_arguments(rank, rope_dim, page_size, torch.float32)
    size = form.layout(rank, rope_dim).row_bytes
    rows = torch.full((7, page_size, size) if page_size else (2, 20, size), 77, dtype=torch.uint8)
    reference, query = rows.clone(), torch.full(arguments["q_rope"].shape, torch.nan)
    expected = naive_write(**arguments, latent_cache=reference, rope_cache=None, row_format=form)
    write_triton(**arguments | {"latent_cache": rows, "rope_cache": None, "query": query, "row_format": form})
    torch.testing.assert_close(query, expected, atol=1e-6, rtol=1e-6)
    written = (rows != 77).any(-1)
    assert torch.equal(written, (reference != 77).any(-1)) and written.sum() == 5
    (latent, key), (expected_latent, expected_key) = (
        naive_unpack(x[written], rank, rope_dim, form, torch.float32) for x in (rows, reference)
    )
    assert torch.equal(latent, expected_latent)
    torch.testing.assert_close(key, expected_key, atol=0.02, rtol=0.07)


def test_write_then_decode_on_the_cpu():
    rank, rope_dim, form = FORMATS["int4 groups"]
    rows = torch.full((2, 20, form.layout(rank, rope_dim).row_bytes), 255, dtype=torch.uint8)
    arguments = write_arguments(rank, rope_dim, 0, torch.float32)
    query = mla_write(**arguments, latent_cache=rows, rope_cache=None, row_format=form)
    latent, key = naive_unpack(rows[:1, 4:7], rank, rope_dim, form, torch.float32)
    assert (latent - arguments["latent"][0]).abs().max() < 0.5
    seen = torch.arange(20)[None, None] >= 4
    mask = (seen & (torch.arange(20) < 7)).expand(2, 3, 20).clone()
    mask[1] = (torch.arange(20) >= 11) & (torch.arange(20) < 13)
    q = torch.randn(2, 3, 5, rank)
    out = mla_decode(q, query, rows, None, None, softmax_scale=0.1, mask=mask, row_format=form)
    logits = (q[0, 0, 0] @ latent[0].T + query[0, 0, 0] @ key[0].T) * 0.1
    torch.testing.assert_close(out[0, 0, 0], logits.softmax(-1) @ latent[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_cache": torch.zeros(2, 14, 16)}, "rope_cache must be None"),
        ({"row_format": RowFormat(80, 1)}, "80 channels of 64"),
        ({"row_format": RowFormat(32, 1)}, r"latent_cache has shape \(2, 14, 112\), expected \(2, any, 96\)"),
        ({"latent_cache": torch.zeros(2, 14, 112)}, "latent_cache has dtype torch.float32, expected torch.uint8"),
        ({"latent_cache": torch.zeros(2, 14, 120, dtype=torch.uint8)[..., :112]}, "must be multiples of 16"),
        ({"row_format": None}, "rope_cache is None"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    case = pack_case(make_case(2, 1, 3, 64, 16, [5, 9], torch.float32), RowFormat(64, 1))
    with pytest.raises(ValueError, match=message):
        mla_decode(**case | changes)


def test_operators_pass_opcheck_and_compile():
    case = pack_case(make_case(2, 1, 3, 64, 16, [5, 9], torch.float32), RowFormat(64, 1))
    out, lse = torch.empty_like(case["q_latent"]), torch.empty(2, 3, 1)
    torch.library.opcheck(ops.decode, tuple(as_problem(case, out, lse)))
    rows = case["latent_cache"].clone()
    arguments = write_arguments(64, 16, 0, torch.float32)
    table = arguments.pop("block_table")
    positions = arguments.pop("positions")
    torch.library.opcheck(
        ops.write, (*arguments.values(), rows, None, positions.remainder(9), table, tuple(case["row_format"]))
    )
    scale, form = case.pop("softmax_scale"), case.pop("row_format")
    compiled = torch.compile(
        lambda **kw: mla_decode(**kw, softmax_scale=scale, row_format=form), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(**case), mla_decode(**case, softmax_scale=scale, row_format=form))
