"""Attention of few queries on cached latents: the kernels of mla_attention where they can serve, else PyTorch's.

Needs only torch and transformers, like the modeling code that it stands beside.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import StaticLayer

try:
    import mla_attention
except ImportError:  # decoding then runs on the library's attention
    mla_attention = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = ("auto", "kernels", "sdpa")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What masks come to: all layers of a step are given the same one. With each, the version of the mask that it is of.
_extents = WeakIdKeyDictionary()


def rotate_planes(planes: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on complex planes: `planes` (..., 2m) holds m real then m imaginary parts, `cos` and `sin` (..., m)."""
    real, imag = planes.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def kernel_choice(config) -> str:
    """One of KERNELS: the environment's MLA_CONVERT_KERNEL, else the configuration's mla_kernel."""
    choice = os.environ.get("MLA_CONVERT_KERNEL") or config.mla_kernel
    if choice not in KERNELS:
        raise ValueError(f"MLA_CONVERT_KERNEL or mla_kernel is {choice!r}, expected one of {KERNELS}")
    return choice


def kernel_refusal(latent: Tensor, rope_dim: int, heads: int, dtype: torch.dtype, needs_grad: bool) -> str | None:
    """Why the kernels of mla_attention cannot serve latents (., ., ., r) and queries like these, or None."""
    rank = latent.shape[-1]
    if mla_attention is None:
        return "the package mla_attention is not installed"
    if rank % 16 or not 16 <= rank <= 576 or rope_dim % 16 or rope_dim > 128 or heads > 128:
        return f"rank {rank}, rope dimension {rope_dim} and {heads} heads are not multiples of 16 up to 576 and 128, and up to 128"
    if dtype not in DTYPES or dtype != latent.dtype:
        return f"queries are {dtype} and the cache is {latent.dtype}"
    if torch.is_grad_enabled() and needs_grad:
        return "gradients are asked for, which the kernels do not compute"
    if latent.device.type != "cuda":
        return f"the cache is on {latent.device}, not on a CUDA device"
    return None if HAS_TRITON else "the package triton is not installed"


def extent_of(mask: Tensor) -> Tensor:
    """`mla_attention.mask_extent`, looked up for a mask (B, 1, T, S) that has been seen before."""
    if torch.compiler.is_compiling() or mask.is_inference():  # compiled: once, by elimination; no versions in the other
        return mla_attention.mask_extent(mask[:, 0])
    version, extent = _extents.get(mask, (None, None))
    if version != mask._version:
        extent = mla_attention.mask_extent(mask[:, 0])
        _extents[mask] = mask._version, extent
    return extent


def kernel_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
    choice: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """`absorbed_attention` on the kernels of mla_attention, or None where they cannot serve and `choice` is "auto"."""
    batch, heads, tokens, _ = q_latent.shape
    needs_grad = q_latent.requires_grad or latent.requires_grad
    reason = kernel_refusal(latent, q_rope.shape[3], heads, q_latent.dtype, needs_grad)
    if reason is None and mask is not None and mask.dtype != torch.bool:
        reason = f"the mask is {mask.dtype}, not boolean"
    if reason is None and mask is not None and (mask.shape[1] != 1 or mask.shape[2:] != (tokens, latent.shape[2])):
        reason = f"the mask has shape {tuple(mask.shape)}"
    if reason is None and mask is None and tokens > 1:
        reason = "several query tokens need a mask"
    if reason is not None:
        if choice == "kernels":
            raise ValueError(f'mla_kernel "kernels" cannot decode: {reason}')
        return None
    lengths = extent = None
    if mask is None:
        lengths = torch.full((batch,), latent.shape[2], dtype=torch.int32, device=latent.device)
    else:
        extent = extent_of(mask).expand(-1, batch).contiguous()
        mask = mask[:, 0].expand(batch, -1, -1)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    attended, lse = mla_attention.mla_decode(
        q_latent.transpose(1, 2),
        q_rope.transpose(1, 2),
        latent.squeeze(1),
        k_rope.squeeze(1),
        lengths,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        mask=mask,
        extent=extent,
        return_lse=True,
    )
    if sinks is not None:
        # A sink adds exp(sink) to the sum of exponentials, and nothing to what is attended.
        kept = torch.sigmoid(lse - sinks.float().view(1, -1, 1))
        attended = attended * kept.transpose(1, 2).unsqueeze(-1).to(attended.dtype)
    return attended.transpose(1, 2)


def write_static(
    cache, layer_idx: int, latent: Tensor, k_rope: Tensor, q_rope: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """RoPE of queries and new keys and the append to a static cache, in one launch; None where that cannot be done.

    latent (B, 1, T, r), k_rope (B, 1, T, 2m) and q_rope (B, H, T, 2m) before RoPE, cos and sin (., T, m). Returns the whole
    of the cache, (B, 1, S, r) and (B, 1, S, 2m), and the rotated queries. Compiled models do without: the compiler fuses
    rotation and append by itself. A cache layer of another class is written to if it has `keys`, `values` and a tensor
    `tokens_written`, which is left as it is.
    """
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    static = type(layer) is StaticLayer
    if not (static or hasattr(layer, "tokens_written")) or cos is None or torch.compiler.is_compiling():
        return None
    needs_grad = latent.requires_grad or q_rope.requires_grad
    if kernel_refusal(latent, q_rope.shape[3], q_rope.shape[1], q_rope.dtype, needs_grad):
        return None
    if static and not layer.is_initialized:
        layer.lazy_initialization(latent, k_rope)
    written = getattr(layer, "cumulative_length" if static else "tokens_written", None)
    if not isinstance(written, Tensor) or layer.keys.dtype != latent.dtype or layer.keys.shape[0] != latent.shape[0]:
        return None
    batch, _, tokens, _ = latent.shape
    positions = written.view(1, 1) if tokens == 1 else torch.arange(tokens, device=latent.device) + written
    positions = positions.expand(batch, tokens)
    q_rope = mla_attention.mla_write(
        latent.squeeze(1),
        k_rope.squeeze(1),
        q_rope.transpose(1, 2),
        cos.expand(batch, -1, -1),
        sin.expand(batch, -1, -1),
        layer.keys.squeeze(1),
        layer.values.squeeze(1),
        positions,
    )
    if static:
        written.add_(tokens)
    return layer.keys, layer.values, q_rope.transpose(1, 2)


def weigh(logits: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights in float32 from scaled logits (B, H, T, S) and a boolean or additive mask.

    `softcap` bounds the logits; `sinks` (H,) are logits that take their part of each row and are then dropped.
    """
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if boolean else logits + mask
    if sinks is None:
        return F.softmax(logits, dim=-1, dtype=torch.float32)
    column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return F.softmax(torch.cat([logits, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
    need_weights: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads on the shared latents, which serve as keys and values. `kernel` is one of KERNELS.

    q_latent (B, H, T, r), q_rope (B, H, T, 2m), latent (B, 1, S, r), k_rope (B, 1, S, 2m), mask broadcastable to
    (B, 1, T, S), boolean or additive. Returns the attended latents (B, H, T, r) and, if asked for, the weights
    (B, H, T, S). `softcap` and `sinks` (H,) as in `weigh`.
    """
    batch, heads, length, rank = q_latent.shape
    if kernel != "sdpa" and not need_weights:
        attended = kernel_attention(q_latent, q_rope, latent, k_rope, mask, scaling, kernel, softcap, sinks)
        if attended is not None:
            return attended, None
    # Heads share keys and values, so they are rows of one query matrix: the latents are read once, not once a head.
    query = torch.cat([q_latent, q_rope], dim=-1).reshape(batch, 1, heads * length, -1)
    key = torch.cat([latent, k_rope], dim=-1)
    if need_weights or softcap is not None or sinks is not None:
        logits = (query @ key.transpose(2, 3)).view(batch, heads, length, -1) * scaling
        weights = weigh(logits, mask, softcap, sinks).to(query.dtype)
        attended = weights.reshape(batch, 1, heads * length, -1) @ latent
        return attended.view(batch, heads, length, rank), weights
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).repeat(1, 1, heads, 1)
    attended = F.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=scaling)
    return attended.view(batch, heads, length, rank), None
