"""Random decode cases, comparison with the reference, and the tolerances; shared with the benchmark on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_attention.naive import find_mask_bounds, naive_decode
from mla_attention.problem import DecodeProblem
from mla_attention.rows import RowFormat, naive_pack

# FlashMLA's tolerances for dense decode (tests/test_flash_mla_dense_decoding.py and tests/kernelkit/compare.py): a number is
# right if its absolute or its relative error is small, and the cosine distance of the whole output must be small as well.
# They hold for caches of standard deviation 0.1, as its tests draw them.
OUT_ABS, OUT_REL, OUT_COS = 8e-4, 2.01 / 128, 5e-6
CACHE_SCALE = 0.1
# Its queries are as small, so that the softmax is almost flat and hides wrong scores. Queries here are a hundred times
# larger, which gives scores of standard deviation 1. The absolute tolerance of the lse, 1e-6 in FlashMLA, is larger for that.
QUERY_SCALE = 10.0
LSE_ABS, LSE_REL = 1e-5, 8.01 / 65536
# Stricter than FlashMLA: the distance of each row from the reference over the row's norm, in units of the dtype's epsilon.
# Rounding of the weights and of the output costs at most 0.5 each. A cosine over all rows would hide faults in a few.
ROW_EPS, ROW_MIN = 1.25, 2e-5
# Numbers of packed rows are rounded to float16 in the kernels: half an epsilon in each term of a score.
LSE_PACKED = 1e-3


def make_case(
    batch: int, tokens: int, heads: int, rank: int, rope_dim: int, lengths: list[int], dtype: torch.dtype,
    page_size: int = 0, device: str = "cpu", seed: int = 0, spare: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `mla_decode` by name. Rows that no query may read are NaN, and so are pages of no sequence."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=CACHE_SCALE):
        return (torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)

    case = {
        "q_latent": normal(batch, tokens, heads, rank, scale=QUERY_SCALE),
        "q_rope": normal(batch, tokens, heads, rope_dim, scale=QUERY_SCALE),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "softmax_scale": (rank + rope_dim) ** -0.5,
    }
    if not page_size:
        longest = max(*lengths, 1) + spare
        latent, rope = normal(batch, longest, rank), normal(batch, longest, rope_dim)
        for b, length in enumerate(lengths):
            latent[b, length:] = torch.nan
            rope[b, length:] = torch.nan
        return case | {"latent_cache": latent, "rope_cache": rope}
    held = [-(-length // page_size) for length in lengths]
    pages = sum(held) + 3
    order = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    table = torch.full((batch, max(*held, 1) + 1), 2147480000, dtype=torch.int32, device=device)
    latent, rope = normal(pages, page_size, rank), normal(pages, page_size, rope_dim)
    taken = 0
    for b, (length, count) in enumerate(zip(lengths, held, strict=True)):
        table[b, :count] = order[taken : taken + count]
        taken += count
        if length % page_size:
            latent[table[b, count - 1], length % page_size :] = torch.nan
            rope[table[b, count - 1], length % page_size :] = torch.nan
    latent[order[taken:].long()] = torch.nan
    rope[order[taken:].long()] = torch.nan
    return case | {"latent_cache": latent, "rope_cache": rope, "block_table": table}


def pack_case(case: dict[str, Any], form: RowFormat) -> dict[str, Any]:
    """The case on packed rows of its numbers; rows that were NaN have all bits set, which is NaN in e4m3 and in scales."""
    latent, rope = case["latent_cache"], case["rope_cache"]
    rows = naive_pack(latent.nan_to_num(0), rope.nan_to_num(0), form)
    rows[latent.isnan().any(-1)] = 255
    return case | {"latent_cache": rows, "rope_cache": None, "row_format": form}


def as_problem(
    case: dict[str, Any], out: Tensor, lse: Tensor, num_splits: int = 0, softcap: float = 0.0, window: int | None = None,
    mask: Tensor | None = None,
) -> DecodeProblem:  # fmt: skip
    """The problem of a case, as `mla_decode` hands it to the launcher; unchecked."""
    return DecodeProblem(
        case["q_latent"], case["q_rope"], case["latent_cache"], case["rope_cache"], case.get("cache_seqlens"),
        case.get("block_table"), case["softmax_scale"], num_splits, softcap, window or 0, mask,
        None if mask is None else find_mask_bounds(mask), out, lse, case.get("row_format"),
    )  # fmt: skip


def disagreement(out: Tensor, lse: Tensor, case: dict[str, Any], **options: Any) -> str | None:
    """Compare a result with the reference in float64: None, or a description of the error."""
    inputs = {name: value.double() if value.is_floating_point() else value
              for name, value in case.items() if torch.is_tensor(value)}  # fmt: skip
    inputs |= {"rope_cache": inputs.get("rope_cache"), "row_format": case.get("row_format")}
    inputs.setdefault("cache_seqlens", None)
    expected_out, expected_lse = naive_decode(**inputs, softmax_scale=case["softmax_scale"], **options)
    if not torch.equal(out.isfinite(), expected_out.isfinite()) or not torch.equal(
        lse.isfinite(), expected_lse.isfinite()
    ):
        return "NaN or infinity where there should be none, or none where there should be"
    empty = ~expected_lse.isfinite()
    if not (lse[empty] == -torch.inf).all():
        return "lse of a query that sees no token is not minus infinity"
    out_dtype = out.dtype
    row_limit = max(ROW_EPS * torch.finfo(out.dtype).eps, ROW_MIN)
    out, lse, expected_lse = out.double(), lse.double().masked_fill(empty, 0), expected_lse.masked_fill(empty, 0)
    error = (out - expected_out).abs()
    row_error = (error.norm(dim=-1) / expected_out.norm(dim=-1).clamp(min=1e-30)).max().item() if out.numel() else 0.0
    wrong = (error >= OUT_ABS) & (error >= OUT_REL * (expected_out.abs() + 1e-6))
    if wrong.any():
        return (
            f"out differs in {int(wrong.sum())} of {wrong.numel()}, by up to {error.max().item():.2e}, "
            f"in a row by up to {row_error:.1e} of its norm"
        )
    if row_error > row_limit:
        return f"a row of out differs by {row_error:.1e} of its norm"
    scale = (out * out + expected_out * expected_out).sum().item()
    distance = 1 - 2 * (out * expected_out).sum().item() / scale if scale else 0.0
    if distance > OUT_COS:
        return f"cosine distance {distance:.1e}"
    error = (lse - expected_lse).abs()
    packed = case.get("row_format") is not None and out_dtype != torch.float32
    wrong = (error >= (LSE_PACKED if packed else LSE_ABS)) & (error >= LSE_REL * (expected_lse.abs() + 1e-6))
    return f"lse differs by up to {error.max().item():.2e}" if wrong.any() else None
