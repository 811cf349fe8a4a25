"""The public functions and operators on the CPU, and the write kernel in the interpreter."""

import pytest
import torch
from cases import disagreement, make_case

import mla_attention
from mla_attention import mla_decode, mla_write, naive_write, ops


def test_decode_on_the_cpu():
    case = make_case(3, 2, 5, 48, 16, [20, 0, 33], torch.bfloat16, page_size=16)
    out, lse = mla_decode(**case, return_lse=True)
    assert disagreement(out, lse, case) is None
    into = torch.full_like(out, torch.nan)
    assert mla_decode(**case, out=into) is into and torch.equal(into, out)


def test_decode_in_float64_is_the_definition():
    case = make_case(1, 1, 2, 16, 16, [9], torch.float64)
    latent, rope = case["latent_cache"][0, :9], case["rope_cache"][0, :9]
    logits = (case["q_latent"][0, 0] @ latent.T + case["q_rope"][0, 0] @ rope.T) * case["softmax_scale"]
    torch.testing.assert_close(mla_decode(**case)[0, 0], logits.softmax(-1) @ latent)


def test_code_of_earlier_conversions_is_served():
    """decode_mla.py beside the weights of earlier conversions calls `mask_extent` and passes `extent`."""
    case = make_case(2, 1, 3, 32, 16, [5, 9], torch.float32)
    mask = torch.arange(case["latent_cache"].shape[1]) < case.pop("cache_seqlens")[:, None, None]
    arguments = case | {"cache_seqlens": None, "mask": mask}
    out = mla_decode(**arguments, extent=mla_attention.mask_extent(mask))
    assert torch.equal(out, mla_decode(**arguments, mask_bounds=mla_attention.find_mask_bounds(mask)))
    assert torch.equal(out, mla_decode(**arguments))
    with pytest.raises(ValueError, match=r"mask_bounds has shape \(2, 2\), expected \(3, 2\)"):
        mla_decode(**arguments, extent=torch.zeros(2, 2, dtype=torch.int32))


def bad(**changes):
    case = make_case(2, 1, 3, 32, 16, [5, 9], torch.float32)
    return {name: changes[name](value) if name in changes else value for name, value in case.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_latent": lambda x: x[..., :24], "latent_cache": lambda x: x[..., :24]}, "rank is 24"),
        ({"q_rope": lambda x: x[..., :8], "rope_cache": lambda x: x[..., :8]}, "rope dimension is 8"),
        ({"q_latent": lambda x: x[0]}, "q_latent has 3 dimensions"),
        ({"latent_cache": lambda x: x[:1]}, r"latent_cache has shape \(1, 14, 32\), expected \(2, any, 32\)"),
        ({"rope_cache": lambda x: x[:, :4]}, "rope_cache has shape"),
        ({"rope_cache": lambda x: x.half()}, "rope_cache has dtype torch.float16, expected torch.float32"),
        (
            {"latent_cache": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
            "last dimension must be contiguous",
        ),
        ({"cache_seqlens": lambda x: x.long()}, "cache_seqlens has dtype torch.int64"),
        ({"softmax_scale": lambda x: -x}, "softmax_scale is -"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        mla_decode(**bad(**changes))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"num_splits": 0}, "num_splits is 0"), ({"softcap": -1.0}, "softcap is -1"), ({"window": 0}, "window is 0")],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        mla_decode(**bad(), **option)


def write_arguments(page_size=0, dtype=torch.float32, rope_dim=16):
    generator = torch.Generator().manual_seed(1)
    batch, tokens, heads, rank = 2, 3, 5, 48
    angles = torch.rand(batch, tokens, rope_dim // 2, generator=generator) * 6
    compressed = torch.randn(batch, tokens, rank + rope_dim, generator=generator).to(dtype)
    latent, k_rope = compressed.split([rank, rope_dim], dim=-1)
    query = torch.randn(batch, heads, tokens, 64 + rope_dim, generator=generator).to(dtype).transpose(1, 2)
    outer, inner = (7, page_size) if page_size else (batch, 20)
    arguments = {
        "latent": latent, "k_rope": k_rope, "q_rope": query[..., 64:], "cos": angles.cos(), "sin": angles.sin(),
        "latent_cache": torch.full((outer, inner, rank), torch.nan).to(dtype),
        "rope_cache": torch.full((outer, inner, rope_dim), torch.nan).to(dtype),
        "positions": torch.tensor([[4, 5, 6], [11, 12, -1]], dtype=torch.int32),
        "block_table": torch.tensor([[3, 1, 2147480000], [0, 6, 5]], dtype=torch.int32) if page_size else None,
    }  # fmt: skip
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("page_size", "rope_dim"), [(0, 16), (6, 16), (0, 48), (6, 0)])
def test_write_kernel(triton, page_size, rope_dim, dtype):
    from mla_attention.write import write_triton

    arguments, reference = write_arguments(page_size, dtype, rope_dim), write_arguments(page_size, dtype, rope_dim)
    expected = naive_write(**reference)
    query = torch.full(arguments["q_rope"].shape, torch.nan, dtype=dtype)
    write_triton(**arguments, query=query)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 8e-3}
    torch.testing.assert_close(query, expected, **tolerance)
    assert torch.equal(arguments["latent_cache"].nan_to_num(9), reference["latent_cache"].nan_to_num(9))
    torch.testing.assert_close(arguments["rope_cache"], reference["rope_cache"], equal_nan=True, **tolerance)


def test_write_on_the_cpu_then_decode():
    arguments = write_arguments()
    expected = naive_write(**write_arguments())
    assert torch.allclose(mla_write(**arguments), expected)
    assert arguments["latent_cache"][0, 4:7].isfinite().all() and arguments["latent_cache"][1, 13].isnan().all()


def test_bad_write_arguments_are_named():
    arguments = write_arguments()
    with pytest.raises(ValueError, match=r"cos has shape \(2, 3, 4\), expected \(2, 3, 8\)"):
        mla_write(**arguments | {"cos": arguments["cos"][..., :4]})
    with pytest.raises(ValueError, match="positions has dtype"):
        mla_write(**arguments | {"positions": arguments["positions"].float()})


def test_operators_pass_opcheck():
    case = make_case(2, 1, 3, 32, 16, [5, 9], torch.float32, page_size=4)
    out, lse = torch.empty_like(case["q_latent"]), torch.empty(2, 3, 1)
    torch.library.opcheck(
        ops.decode,
        (case["q_latent"], case["q_rope"], case["latent_cache"], case["rope_cache"], case["cache_seqlens"],
         case["block_table"], 0.1, 0, 0.0, 0, None, None, out, lse),
    )  # fmt: skip
    arguments = write_arguments()
    arguments["latent_cache"].zero_()
    arguments["rope_cache"].zero_()
    torch.library.opcheck(ops.write, tuple(arguments.values()))


def test_compiles_without_a_graph_break():
    case = make_case(2, 1, 3, 32, 16, [5, 9], torch.float32)
    compiled = torch.compile(
        lambda scale, **kw: mla_decode(**kw, softmax_scale=scale) * 2, fullgraph=True, backend="aot_eager"
    )
    scale = case.pop("softmax_scale")
    torch.testing.assert_close(compiled(scale, **case), mla_decode(**case, softmax_scale=scale) * 2)
