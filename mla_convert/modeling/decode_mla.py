"""Attention of few queries on cached latents: the kernels of mla_attention where they can serve, else PyTorch's.

Needs only torch and transformers, like the modeling code beside it.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

try:
    import mla_attention
except ImportError:  # decoding runs on the library's attention
    mla_attention = None

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Version and bounds of masks: all layers of a step have the same mask.
_mask_bounds = WeakIdKeyDictionary()


def rotate_planes(planes: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on complex planes: `planes` (..., 2m) holds m real then m imaginary parts, `cos` and `sin` (..., m)."""
    real, imag = planes.chunk(2, dim=-1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1)


def kernel_refusal(
    latent: Tensor, rope_dim: int, heads: int, dtype: torch.dtype, needs_grad: bool, packed_rank: int = 0
) -> str | None:
    """The reason why the kernels of mla_attention cannot serve a call, or None.

    Args:
        latent: (., ., ., r), cached latents, or packed rows.
        rope_dim: numbers of a rotary key.
        heads: number of heads.
        dtype: dtype of the queries.
        needs_grad: whether an input requires gradients.
        packed_rank: rank of packed rows; 0 where the cache holds numbers.
    """
    rank, most = packed_rank or latent.shape[-1], getattr(mla_attention, "MAX_RANK", 576)
    if mla_attention is None:
        return "the package mla_attention is not installed"
    if not hasattr(mla_attention, "RowFormat" if packed_rank else "find_mask_bounds"):
        return "the installed mla_attention is older than this code"
    if rank % 16 or not 16 <= rank <= most or rope_dim % 16 or rope_dim > 128 or heads > 128:
        limits = f"multiples of 16 up to {most} and 128, and up to 128"
        return f"rank {rank}, rope dimension {rope_dim} and {heads} heads are not {limits}"
    if dtype not in DTYPES or (not packed_rank and dtype != latent.dtype):
        return f"queries are {dtype} and the cache is {latent.dtype}"
    if torch.is_grad_enabled() and needs_grad:
        return "gradients are required, which the kernels do not compute"
    if latent.device.type != "cuda":
        return f"the cache is on {latent.device}, not on a CUDA device"
    return None if HAS_TRITON else "the package triton is not installed"


def mask_bounds(mask: Tensor) -> Tensor:
    """`mla_attention.find_mask_bounds` of a mask (B, 1, T, S), computed once for all layers that share the mask."""
    # the compiler removes repeated computation itself, and tensors of inference mode have no version
    if torch.compiler.is_compiling() or mask.is_inference():
        return mla_attention.find_mask_bounds(mask[:, 0])
    version, bounds = _mask_bounds.get(mask, (None, None))
    if version != mask._version:
        bounds = mla_attention.find_mask_bounds(mask[:, 0])
        _mask_bounds[mask] = mask._version, bounds
    return bounds


def kernel_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    choice: str,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    row_format: tuple[int, ...] | None = None,
) -> Tensor | None:
    """`absorbed_attention` on the kernels of mla_attention, with the same arguments but `choice`, "auto" or "kernels".

    With `row_format`, the numbers of an `mla_attention.RowFormat`, `latent` holds packed rows and `k_rope` is None.

    Returns:
        The attended latents (B, H, T, r); None where the kernels cannot serve and `choice` is "auto".

    Raises:
        ValueError: the kernels cannot serve and `choice` is "kernels".
    """
    batch, heads, tokens, rank = q_latent.shape
    needs_grad = q_latent.requires_grad or latent.requires_grad
    reason = kernel_refusal(latent, q_rope.shape[3], heads, q_latent.dtype, needs_grad, rank if row_format else 0)
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
    lengths = bounds = None
    if mask is None:
        lengths = torch.full((batch,), latent.shape[2], dtype=torch.int32, device=latent.device)
    else:
        bounds = mask_bounds(mask).expand(-1, batch).contiguous()
        mask = mask[:, 0].expand(batch, -1, -1)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    attended, lse = mla_attention.mla_decode(
        q_latent.transpose(1, 2),
        q_rope.transpose(1, 2),
        latent.squeeze(1),
        None if row_format else k_rope.squeeze(1),
        lengths,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        mask=mask,
        mask_bounds=bounds,
        return_lse=True,
        **({"row_format": mla_attention.RowFormat(*row_format)} if row_format else {}),
    )
    if sinks is not None:
        # A sink adds exp(sink) to the sum of exponentials, and nothing to the weighted sum.
        kept = torch.sigmoid(lse - sinks.float().view(1, -1, 1))
        attended = attended * kept.transpose(1, 2).unsqueeze(-1).to(attended.dtype)
    return attended.transpose(1, 2)


def cache_layer(cache: Cache, layer_idx: int) -> CacheLayerMixin | None:
    """A layer of a cache, where it exists yet.

    Raises:
        ValueError: it was laid out for the original's heads.
    """
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    keys = getattr(layer, "keys", None) if getattr(layer, "is_initialized", False) else None
    if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[1] != 1:
        raise ValueError(
            f"this cache was laid out for {keys.shape[1]} heads of keys, and a converted model caches one latent for all: let "
            f"the first forward pass lay it out"
        )
    return layer


def update_cache(cache: Cache, layer_idx: int, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Append new tokens to a transformers cache.

    A quantised cache takes whole groups of numbers, so that its rows are padded with zeros to the next whole group.

    Args:
        cache: a cache with layers.
        layer_idx: index of the layer.
        latent: (B, 1, T, r).
        k_rope: (B, 1, T, 2m), rotated.

    Returns:
        Latents and rotary keys of all cached tokens.

    Raises:
        ValueError: the cache was laid out for the original's heads.
    """
    group = getattr(cache_layer(cache, layer_idx), "q_group_size", None)
    if not group:
        return cache.update(latent, k_rope, layer_idx)
    padded = tuple(
        F.pad(rows, (0, -rows.shape[-1] % group or group * (not rows.shape[-1]))) for rows in (latent, k_rope)
    )
    cached = cache.update(*padded, layer_idx)
    return tuple(rows[..., : new.shape[-1]] for rows, new in zip(cached, (latent, k_rope), strict=True))


@functools.cache
def _takes_basis(write: Callable) -> bool:
    """Whether the installed `mla_write` knows rows whose last channels are the rotary key."""
    return "key_basis" in inspect.signature(write).parameters


def write_static(
    cache: Cache,
    layer_idx: int,
    latent: Tensor,
    k_rope: Tensor,
    q_rope: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    row_format: tuple[int, ...] | None = None,
    row_bytes: int = 0,
    key_basis: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Apply RoPE to queries and new keys and append to a static cache, in one launch.

    Compiled models do not need this: the compiler fuses rotation and append. A cache layer of another class is served if it
    has `keys`, `values` and a tensor `tokens_written`, which stays unchanged.

    Args:
        cache: a cache with layers.
        layer_idx: index of the layer.
        latent: (B, 1, T, r).
        k_rope: (B, 1, T, 2m), before RoPE.
        q_rope: (B, H, T, 2m), before RoPE.
        cos: (., T, m).
        sin: (., T, m).
        row_format: numbers of an `mla_attention.RowFormat`, for a cache of packed rows in the place of the latents; the place
            of the keys is then empty.
        row_bytes: bytes of such a row.
        key_basis: (2m, 2m), matrix that rotated keys and queries are multiplied by, where the keys are channels of the latent.

    Returns:
        The whole cache, latents (B, 1, S, r) and rotary keys (B, 1, S, 2m), and the rotated queries; None where the kernel
        cannot serve.
    """
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    static = type(layer) is StaticLayer
    if not (static or hasattr(layer, "tokens_written")) or cos is None or torch.compiler.is_compiling():
        return None
    needs_grad = latent.requires_grad or q_rope.requires_grad
    rank, rope_dim = latent.shape[3], q_rope.shape[3]
    sizes = (rank, rope_dim) if key_basis is None else (rank + rope_dim, 0)  # as the kernels see them
    if kernel_refusal(latent, sizes[1], q_rope.shape[1], q_rope.dtype, needs_grad, sizes[0] if row_format else 0):
        return None
    if key_basis is not None and not _takes_basis(mla_attention.mla_write):
        return None
    if row_format:  # nothing but shapes and dtypes
        stored = [latent.new_empty((len(latent), 1, 0, size), dtype=torch.uint8) for size in (row_bytes, 0)]
    else:
        stored = [latent, k_rope]
    if static and not layer.is_initialized:
        layer.lazy_initialization(*stored)
    written = getattr(layer, "cumulative_length" if static else "tokens_written", None)
    if not isinstance(written, Tensor) or layer.keys.dtype != stored[0].dtype or layer.keys.shape[0] != latent.shape[0]:
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
        None if row_format else layer.values.squeeze(1),
        positions,
        **({"row_format": mla_attention.RowFormat(*row_format)} if row_format else {}),
        **({} if key_basis is None else {"key_basis": key_basis}),
    )
    if static:
        written.add_(tokens)
    return layer.keys, layer.values, q_rope.transpose(1, 2)


def weigh(logits: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights in float32.

    Args:
        logits: (B, H, T, S), scaled.
        mask: boolean or additive, broadcastable to the logits.
        softcap: bound of the logits, by tanh.
        sinks: (H,), logits that take part in each row's softmax and whose weights are dropped.
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


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0,
    scaling: float = 1.0, softcap: float | None = None, s_aux: Tensor | None = None, **_,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention of query and key (B, H, ., qk) and value (B, H, S, v): the output (B, T, H, v), and its weights."""
    weights = weigh(query @ key.transpose(2, 3) * scaling, mask, softcap, s_aux).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection is its weight matrix alone, so that a product with the matrix can replace the call.

    Adapters, quantised weights, weights that are off the device until the call, biases and hooks are more than that.
    """
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
    )


def linear_map(linear: nn.Module) -> Tensor | None:
    """The matrix (out, in) of a projection; None where the projection also adds a bias. Differentiable.

    Unless the projection is plain, the matrix is the module's output for the unit vectors, which includes adapters and
    quantised weights.
    """
    if is_plain(linear):
        return linear.weight
    width, weight = linear.in_features, next((p for p in linear.parameters() if p.is_floating_point()), None)
    like = {} if weight is None or weight.itemsize == 1 else {"dtype": weight.dtype}
    place = next(linear.parameters()).device
    hook = getattr(linear, "_hf_hook", None)
    place = getattr(hook, "execution_device", None) if place.type == "meta" and hook else place
    units = torch.cat([torch.eye(width, device=place, **like), torch.zeros(1, width, device=place, **like)])
    rows = linear(units)
    if not torch.compiler.is_compiling() and rows[width].count_nonzero():
        return None
    return rows[:width].t()


def leave_out_hidden(mask: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Cached rows (B, 1, S, .) with zeros where no query of the mask (B or 1, H or 1, T, S) sees the row.

    Such rows may hold anything, NaN included, and a weight of zero does not remove a NaN.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    seen = seen.any(dim=2, keepdim=True).any(dim=1, keepdim=True).transpose(2, 3)
    return tuple(torch.where(seen, row, 0) for row in rows)


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
    """Attention of all heads on the shared latents, which serve as keys and values (arXiv 2405.04434, section 2.1.2).

    Args:
        q_latent: (B, H, T, r), queries multiplied by the key up-projection.
        q_rope: (B, H, T, 2m), rotated.
        latent: (B, 1, S, r).
        k_rope: (B, 1, S, 2m), rotated.
        mask: boolean or additive, broadcastable to (B, 1, T, S).
        scaling: multiplies the scores.
        need_weights: also return the attention weights.
        softcap: as in `weigh`.
        sinks: as in `weigh`.
        kernel: "auto", "kernels" or "sdpa", as in the configuration's `mla_kernel`.

    Returns:
        The attended latents (B, H, T, r), and the weights (B, H, T, S) or None.
    """
    batch, heads, length, rank = q_latent.shape
    if kernel != "sdpa" and not need_weights:
        attended = kernel_attention(q_latent, q_rope, latent, k_rope, mask, scaling, kernel, softcap, sinks)
        if attended is not None:
            return attended, None
    # Heads share keys and values, and are rows of one query matrix, so that the latents are read once for all heads.
    query = torch.cat([q_latent, q_rope], dim=-1).reshape(batch, 1, heads * length, -1)
    key = torch.cat([latent, k_rope], dim=-1)
    if mask is not None:
        (key,) = leave_out_hidden(mask, key)
        latent = key[..., :rank]
    if need_weights or softcap is not None or sinks is not None:
        logits = (query @ key.transpose(2, 3)).view(batch, heads, length, -1) * scaling
        weights = weigh(logits, mask, softcap, sinks).to(query.dtype)
        attended = weights.reshape(batch, 1, heads * length, -1) @ latent
        return attended.view(batch, heads, length, rank), weights
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).repeat(1, 1, heads, 1)
    attended = F.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=scaling)
    return attended.view(batch, heads, length, rank), None
