"""Quantise latents and rotary keys to the rows of latent_format_mla.py, read them back, and cache them.

Needs only torch and transformers, like the modeling code beside it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .decode_mla import cache_layer, rotate_planes, write_static
from .latent_format_mla import ALIGN, CODES, FP8, LatentFormat, kernel_format, key_basis

FP8_LARGEST = 448.0
FP16_LARGEST = 65504.0
# Scales of 4-bit codes that are tried, as factors of that at which the largest number is just representable. A smaller one
# cuts that number and rounds all others less: a tenth of the mean squared error in groups of 128 Gaussian numbers, a
# twelfth in groups of 48.
FACTORS4 = (1.0, 0.95, 0.9)


def _steps(grouped: Tensor, scale: Tensor) -> Tensor:
    """Values (..., groups, group) over their groups' scales (..., groups); 0 where the scale is 0."""
    return grouped / scale.masked_fill(scale == 0, torch.inf)[..., None]


def _rounded_scale(scale: Tensor) -> Tensor:
    """The scale as stored."""
    return scale.clamp(-FP16_LARGEST, FP16_LARGEST).half().float()


def _quantised4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., groups, group) from -8 to 7 and scales (..., groups), each the one of FACTORS4 with the least squared error."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    # The number of largest magnitude has code -8, whatever its sign: all 16 codes are in use.
    largest = torch.where(high >= -low, high, low)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in FACTORS4:
        scale = _rounded_scale(largest * (factor / -8))
        codes = _steps(grouped, scale).round().clamp(-8, 7)
        error = (codes * scale[..., None] - grouped).square().sum(-1)
        if best is not None:
            better = error < best[2]
            codes = torch.where(better[..., None], codes, best[0])
            scale, error = torch.where(better, scale, best[1]), torch.minimum(error, best[2])
        best = codes, scale, error
    return best[:2]


def _quantised(values: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (..., n) of channels (..., n) and the scales (..., groups) of their groups, both float32.

    Scales with 4 bits may be negative. A scale of zero gives zeros.

    Args:
        values: float32.
        group: channels of a group; the last group may have fewer.
        bits: 8 (int8), 4 or 0 (e4m3).
    """
    channels = values.shape[-1]
    grouped = F.pad(values, (0, -channels % group)).unflatten(-1, (-1, group))
    if bits == 4:
        codes, scale = _quantised4(grouped)
    else:
        scale = _rounded_scale(grouped.abs().amax(-1) / (127.0 if bits else FP8_LARGEST))
        steps = _steps(grouped, scale)
        codes = steps.round().clamp(-127, 127) if bits else steps.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8).float()
    return codes.flatten(-2)[..., :channels], scale


def _expand(scales: Tensor, group: int, channels: int) -> Tensor:
    """The scale of every channel (..., channels) from those of groups (..., groups)."""
    return scales[..., None].expand(*scales.shape, group).flatten(-2)[..., :channels]


def _sections(fmt: LatentFormat, latent: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Codes, scales and group size of the channels with 8 bits and of those with 4, where there are any."""
    parts = []
    for values, bits in ((latent[..., : fmt.wide], 0 if fmt.kind == "fp8" else 8), (latent[..., fmt.wide :], 4)):
        if values.shape[-1]:
            group = fmt.group or values.shape[-1]
            parts.append((*_quantised(values.float(), group, bits), group))
    return parts


def _rope_section(fmt: LatentFormat, rope: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The rotary key (..., 2m) as stored, bfloat16 or codes, and its scale if it has one."""
    if fmt.rope == "bf16" or not fmt.rope_dim:
        return rope.bfloat16(), []
    codes, scale = _quantised(rope.float(), fmt.rope_dim, 0 if fmt.rope == "fp8" else 8)
    return codes.to(CODES[fmt.rope]), [scale]


def quantise_rows(fmt: LatentFormat, latent: Tensor, rope: Tensor) -> Tensor:
    """Pack tokens.

    Args:
        fmt: layout of a row.
        latent: (..., r), any float dtype.
        rope: (..., 2m), rotated.

    Returns:
        (..., row_bytes), uint8.
    """
    if fmt.joint is not fmt:
        return quantise_rows(fmt.joint, torch.cat([latent, fmt.spread(rope)], -1), rope[..., :0])
    sections = _sections(fmt, latent)
    parts = []
    if fmt.wide:
        parts.append(sections[0][0].to(FP8 if fmt.kind == "fp8" else torch.int8).view(torch.uint8))
    if fmt.narrow:
        low, high = (sections[-1][0] + 8).to(torch.uint8).chunk(2, -1)
        parts.append(low | high << 4)
    stored, more = _rope_section(fmt, rope)
    parts.append(stored.contiguous().view(torch.uint8))
    scales = [*(scale for _, scale, _ in sections), *more]
    parts.append(torch.cat(scales, -1).half().view(torch.uint8))
    return torch.cat([F.pad(part, (0, -part.shape[-1] % ALIGN)) for part in parts], -1)


def dequantise_rows(fmt: LatentFormat, rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Latents (..., r) and rotary keys (..., 2m) of packed tokens (..., row_bytes); the keys as from `LatentFormat.spread`.

    Args:
        fmt: layout of a row.
        rows: uint8.
        dtype: of the result; products are rounded to it from float32.
    """
    if fmt.joint is not fmt:
        both, _ = dequantise_rows(fmt.joint, rows, dtype)
        return both[..., : fmt.rank], both[..., fmt.rank :]
    scales = rows[..., fmt.scales_at : fmt.scales_at + 2 * fmt.scales].contiguous().view(torch.float16).float()
    codes = []
    if fmt.wide:
        part = rows[..., : fmt.wide].contiguous()
        codes.append(part.view(FP8 if fmt.kind == "fp8" else torch.int8).float())
    if fmt.narrow:
        part = rows[..., fmt.codes4_at : fmt.codes4_at + fmt.narrow // 2]
        codes += [(part & 15).float() - 8, (part >> 4).float() - 8]
    wide = -(-fmt.wide // fmt.group) if fmt.group else int(fmt.wide > 0)
    each = [
        _expand(part, fmt.group or channels, channels)
        for part, channels in ((scales[..., :wide], fmt.wide), (scales[..., wide : len(fmt.groups)], fmt.narrow))
        if channels
    ]
    part = rows[..., fmt.rope_at : fmt.rope_at + fmt.rope_bytes].contiguous()
    if fmt.rope == "bf16" or not fmt.rope_dim:
        rope = part.view(torch.bfloat16).to(dtype)
    else:
        rope = (part.view(CODES[fmt.rope]).float() * scales[..., -1:]).to(dtype)
    return (torch.cat(codes, -1) * torch.cat(each, -1)).to(dtype), rope


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def pass_through(fmt: LatentFormat, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and rotated keys as a cache returns them, without packing them.

    The gradient is that of the identity (straight-through estimator, arXiv 1308.3432).

    Args:
        fmt: layout of a row.
        latent: (..., r).
        rope: (..., 2m), rotated.

    Returns:
        Both in the dtype of `latent`, equal to `dequantise_rows` of `quantise_rows`.
    """
    if fmt.joint is not fmt:
        both, _ = pass_through(fmt.joint, torch.cat([latent, fmt.spread(rope)], -1), rope[..., :0])
        return both[..., : fmt.rank], both[..., fmt.rank :]
    with torch.no_grad():
        parts = [codes * _expand(scales, group, codes.shape[-1]) for codes, scales, group in _sections(fmt, latent)]
        cached = torch.cat(parts, -1).to(latent.dtype)
        stored, scale = _rope_section(fmt, rope)
        key = (stored.float() * scale[0] if scale else stored).to(rope.dtype)
    if not torch.is_grad_enabled():
        return cached, key
    return _StraightThrough.apply(latent, cached), _StraightThrough.apply(rope, key)


def with_gradient(cached: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cached latents and keys (B, 1, S, .) whose last tokens are `new` (B, 1, T, .), which carry the gradient.

    Raises:
        ValueError: the last rows are others, as in a static cache.
    """
    tokens = new[0].shape[2]
    if not all(torch.equal(old[:, :, -tokens:], part) for old, part in zip(cached, new, strict=True)):
        raise ValueError("gradients pass only through a cache whose last rows are the new tokens: use a dynamic cache")
    return tuple(torch.cat([old[:, :, :-tokens], part], dim=2) for old, part in zip(cached, new, strict=True))


def update_packed(cache: Cache, layer_idx: int, rows: Tensor) -> Tensor:
    """Append packed tokens to a transformers cache: the rows in its key slot, nothing in its value slot.

    Args:
        cache: a cache with layers.
        layer_idx: index of the layer.
        rows: (B, 1, T, row_bytes), uint8, as from `quantise_rows`.

    Returns:
        The rows of all cached tokens.

    Raises:
        ValueError: the cache quantises by itself, holds numbers, or was laid out for the original's heads.
    """
    layer = cache_layer(cache, layer_idx)
    if getattr(layer, "q_group_size", None):
        raise ValueError(
            f"{type(layer).__name__} would quantise the quantised latents of this model: use a plain cache"
        )
    keys = getattr(layer, "keys", None) if getattr(layer, "is_initialized", False) else None
    if isinstance(keys, Tensor) and keys.numel() and (keys.dtype, keys.shape[-1]) != (rows.dtype, rows.shape[-1]):
        raise ValueError(
            f"this cache holds {keys.shape[-1]} numbers of {keys.dtype} a token, and the model caches {rows.shape[-1]} bytes: "
            f"it was filled by another model"
        )
    return cache.update(rows, rows[..., :0], layer_idx)[0]


def write_packed(
    fmt: LatentFormat, cache: Cache, layer_idx: int, latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor | None,
    sin: Tensor | None, weight: Tensor | None, kernels: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """Apply RoPE to queries and new keys, quantise, and append: in one launch for a static cache where the kernels serve.

    Args:
        fmt: layout of a row.
        cache: a cache with layers.
        layer_idx: index of the layer.
        latent: (B, 1, T, r).
        k_rope: (B, 1, T, 2m), before RoPE.
        q_rope: (B, H, T, 2m), before RoPE.
        cos: (., T, m); None without RoPE.
        sin: the same.
        weight: (2m,), factors of rotated queries; None for none.
        kernels: whether the kernels may serve.

    Returns:
        The queries as `finish_queries` gives them, the rows of all cached tokens, and None in the place of the keys.
    """
    form, basis = kernel_format(fmt), key_basis(fmt, q_rope)
    # the launch that spreads has no factors in between
    if kernels and form and (basis is None or weight is None):
        written = write_static(cache, layer_idx, latent, k_rope, q_rope, cos, sin, form, fmt.row_bytes, key_basis=basis)
        if written:
            rows, _, q_rope = written
            return q_rope if basis is not None else finish_queries(fmt, q_rope, weight), rows, None
    if cos is not None:
        cos, sin = cos.unsqueeze(1).to(q_rope), sin.unsqueeze(1).to(q_rope)
        q_rope, k_rope = rotate_planes(q_rope, cos, sin), rotate_planes(k_rope, cos, sin)
    rows = update_packed(cache, layer_idx, quantise_rows(fmt, latent, k_rope))
    return finish_queries(fmt, q_rope, weight), rows, None


def finish_queries(fmt: LatentFormat | None, q_rope: Tensor, weight: Tensor | None) -> Tensor:
    """Rotated queries (..., 2m) times their factors, in the basis in which keys are cached; no format: as numbers."""
    q_rope = q_rope if weight is None else q_rope * weight
    return q_rope if fmt is None else fmt.spread(q_rope)
