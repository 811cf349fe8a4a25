"""Random decode cases, the reference's answer to them, and FlashMLA's tolerances; shared with the benchmark on a GPU."""

import torch

from mla_attention.naive import naive_decode

# FlashMLA's own for dense decode: absolute, relative and cosine distance of the output; absolute and relative of the lse.
OUT_ABS, OUT_REL, OUT_COS = 8e-4, 2.01 / 128, 5e-6
LSE_ABS, LSE_REL = 1e-6, 8.01 / 65536


def make_case(batch, tokens, heads, rank, rope_dim, lengths, dtype, page_size=0, device="cpu", seed=0, spare=5):
    """Arguments of `mla_decode` by name. What no query may read is NaN, and so are the pages that no sequence holds."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    case = {
        "q_latent": normal(batch, tokens, heads, rank),
        "q_rope": normal(batch, tokens, heads, rope_dim),
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


def disagreement(out, lse, case, **options) -> str | None:
    """What is wrong with a result, or None: compared with the reference in float64."""
    inputs = {name: value.double() if value.is_floating_point() else value
              for name, value in case.items() if torch.is_tensor(value)}  # fmt: skip
    want_out, want_lse = naive_decode(**inputs, softmax_scale=case["softmax_scale"], **options)
    if not torch.equal(out.isfinite(), want_out.isfinite()) or not torch.equal(lse.isfinite(), want_lse.isfinite()):
        return "NaN or infinity where there should be none, or none where there should be"
    empty = ~want_lse.isfinite()
    if not (lse[empty] == -torch.inf).all():
        return "lse of a query that sees nothing is not minus infinity"
    out, lse, want_lse = out.double(), lse.double().masked_fill(empty, 0), want_lse.masked_fill(empty, 0)
    wrong = (out - want_out).abs() > OUT_ABS + OUT_REL * want_out.abs()
    if wrong.any():
        return (
            f"out differs in {int(wrong.sum())} of {wrong.numel()}, by up to {(out - want_out).abs().max().item():.2e}"
        )
    scale = (out * out + want_out * want_out).sum().item()
    distance = 1 - 2 * (out * want_out).sum().item() / scale if scale else 0.0
    if distance > OUT_COS:
        return f"cosine distance {distance:.1e}"
    wrong = (lse - want_lse).abs() > LSE_ABS + LSE_REL * want_lse.abs()
    return f"lse differs by up to {(lse - want_lse).abs().max().item():.2e}" if wrong.any() else None
