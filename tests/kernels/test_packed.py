"""Packed rows: their bytes, the public functions on the CPU, and the kernels in the interpreter.

No bfloat16 in the interpreter: Triton 3.6 multiplies its bit patterns as integers, and rounds to it towards zero.
"""

import pytest
import torch
from cases import as_problem, disagreement, make_case, pack_case

from mla_attention import RowFormat, find_mask_bounds, mla_decode, mla_write, naive_write, ops
from mla_attention.decode import launch_decode
from mla_attention.naive import rotate
from mla_attention.rows import naive_pack, naive_unpack
from mla_attention.tuning import DecodeConfig
from mla_convert.modeling.latent_format_mla import LatentFormat, spreading
from mla_convert.modeling.quantised_latent_mla import dequantise_rows, quantise_rows

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
    "mixed at 8": (64, 16, RowFormat(8, 0, 32)),
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
    latent[3], latent[16], latent[17], latent[48], latent[79] = 127.0, -8.0, 3.0, 6.0, 16.0
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


# Rank, rope dimension, channels with 8 bits and group of rows whose last channels are the rotary key: groups with numbers of
# both, keys of one Hadamard matrix and of two, sizes that only together are a multiple of 16.
JOINT = {
    "one scale": (32, 16, 0, 0),
    "groups of both": (80, 32, 0, 48),
    "two matrices": (40, 24, 0, 32),
    "mixed": (96, 48, 16, 32),
    "wide groups": (224, 128, 32, 48),
}
joint = pytest.mark.parametrize(("rank", "rope_dim", "wide", "group"), JOINT.values(), ids=JOINT)


def joint_write(rank, rope_dim, wide, group, page_size, dtype, launch=True):
    """Rows and queries of `write_arguments`: from the kernel, or from the public function on the CPU."""
    from mla_attention.write import write_triton

    form, arguments = RowFormat(wide, 0, group), write_arguments(rank, rope_dim, page_size, dtype)
    arguments["key_basis"] = spreading(rope_dim).mT.to(dtype).contiguous()
    size = form.layout(rank + rope_dim, 0).row_bytes
    rows = torch.full((7, page_size, size) if page_size else (2, 20, size), 77, dtype=torch.uint8)
    arguments |= {"latent_cache": rows, "rope_cache": None, "row_format": form}
    if not launch:
        return rows, mla_write(**arguments, query_room=rank)
    query = torch.full((2, 3, 5, rank + rope_dim), torch.nan, dtype=dtype)
    write_triton(**arguments, query=query[..., rank:])
    return rows, query


@joint
@pytest.mark.parametrize("page_size", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_write_kernel_of_joint_rows(triton, rank, rope_dim, wide, group, page_size, dtype):
    """Groups of the latent alone to the bit; others to a step of a code, as sums of another order are rounded."""
    rows, query = joint_write(rank, rope_dim, wide, group, page_size, dtype)
    reference, expected = joint_write(rank, rope_dim, wide, group, page_size, dtype, launch=False)
    assert query[..., :rank].isnan().all()  # left to the caller
    fine = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(query[..., rank:], expected[..., rank:], atol=2 * fine, rtol=fine)
    written = (rows != 77).any(-1)
    assert torch.equal(written, (reference != 77).any(-1)) and written.sum() == 5
    fmt = LatentFormat("mixed", rank, rope_dim, group, wide, "int4").joint
    alone = (rank - wide) // group * group + wide if group else wide
    found, good = rows[written], reference[written]
    numbers = [dequantise_rows(fmt, x)[0] for x in (found, good)]
    assert torch.equal(numbers[0][:, :alone], numbers[1][:, :alone])
    scales, good_scales = (
        x[:, fmt.scales_at : fmt.scales_at + 2 * fmt.scales].view(torch.float16).float() for x in (found, good)
    )
    torch.testing.assert_close(scales, good_scales, atol=0, rtol=1e-3 if dtype == torch.float32 else 2e-3)
    filled = [*range(wide), *range(fmt.codes4_at, fmt.codes4_at + fmt.narrow // 2),
              *range(fmt.scales_at, fmt.scales_at + 2 * fmt.scales)]  # fmt: skip
    assert (found != good)[:, filled].float().mean() < 0.01
    step = good_scales.abs().amax(-1, keepdim=True)
    assert ((numbers[0] - numbers[1]).abs() <= 1.01 * step).all()


@joint
def test_the_public_function_writes_what_the_model_packs(rank, rope_dim, wide, group):
    """In float32 to the bit but for ties, which have not happened at this seed."""
    rows, query = joint_write(rank, rope_dim, wide, group, 0, torch.float32, launch=False)
    arguments = write_arguments(rank, rope_dim, 0, torch.float32)
    cos, sin = arguments["cos"], arguments["sin"]
    fmt = LatentFormat("mixed", rank, rope_dim, group, wide, "int4")
    expected = quantise_rows(fmt, arguments["latent"], rotate(arguments["k_rope"], cos, sin))
    assert torch.equal(rows[0, 4:7], expected[0]) and torch.equal(rows[1, 11:13], expected[1, :2])
    rotated = rotate(arguments["q_rope"], cos[:, :, None], sin[:, :, None])
    torch.testing.assert_close(query[..., rank:], fmt.spread(rotated))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_format": RowFormat(64, 0)}, "no channels of 4 bits for a rotary key"),
        ({"row_format": RowFormat(0, 0, 0, 1)}, "no channels of 4 bits for a rotary key"),
        ({"row_format": None}, "no channels of 4 bits for a rotary key"),
        ({"key_basis": torch.eye(12)}, r"key_basis has shape \(12, 12\), expected \(16, 16\)"),
        ({"key_basis": torch.eye(32)[:16, :16]}, "key_basis must be contiguous"),
        ({"key_basis": torch.eye(16).double()}, "key_basis has dtype torch.float64"),
        ({"latent": torch.zeros(2, 3, 40)}, "rank is 56"),
    ],
)
def test_a_wrong_basis_is_named(changes, message):
    arguments = write_arguments(48, 16, 0, torch.float32) | {"key_basis": torch.eye(16), "row_format": RowFormat(0, 0)}
    rows = torch.zeros(2, 20, RowFormat(0, 0).layout(64, 0).row_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        mla_write(**arguments | {"latent_cache": rows, "rope_cache": None} | changes)


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
    joint = torch.zeros(2, 9, RowFormat(0, 0, 32).layout(80, 0).row_bytes, dtype=torch.uint8)
    arguments = (*arguments.values(), joint, None, positions.remainder(9), table, (0, 0, 32, 0), torch.eye(16), 64)
    torch.library.opcheck(ops.write, arguments)
    scale, form = case.pop("softmax_scale"), case.pop("row_format")
    compiled = torch.compile(
        lambda **kw: mla_decode(**kw, softmax_scale=scale, row_format=form), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(**case), mla_decode(**case, softmax_scale=scale, row_format=form))
