"""One layer's converted attention in DeepSeek-V3's form: order of rows, zero padding, and a latent norm without effect.

Engines apply an RMSNorm to the latent c, which a converted model does not have. On alpha c with a small alpha it is linear,

    norm(alpha c) = gain * alpha c / sqrt(alpha^2 mean(c^2) + eps) = c * gain * alpha / sqrt(eps)

to a relative error of alpha^2 mean(c^2) / (2 eps). The rows of the latent are scaled by alpha, a power of two; the gain is
the power of two nearest to sqrt(eps) / alpha, and the remaining factor, between 0.7 and 1.4, is multiplied into kv_b_proj.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_convert.publish.engines.padding import Sizes

# Largest relative error of the latent by its norm, for any input (`LatentNorm.distortion`).
DISTORTION = 1e-5


@dataclass(frozen=True)
class LatentNorm:
    """An RMSNorm on alpha c. `eps` is the engine's epsilon, added to the mean square."""

    alpha: float
    eps: float

    @property
    def gain(self) -> float:
        """Weight of the norm, a power of two."""
        return 2.0 ** round(math.log2(math.sqrt(self.eps) / self.alpha))

    @property
    def remainder(self) -> float:
        """Factor on kv_b_proj that makes the norm the identity."""
        return math.sqrt(self.eps) / (self.alpha * self.gain)

    def distortion(self, mean_square: float) -> float:
        """Relative error by the norm of a latent with this mean square."""
        return self.alpha**2 * mean_square / (2 * self.eps)

    @classmethod
    def linear(cls, eps: float, mean_square: float, largest: float, smallest: float) -> LatentNorm | None:
        """The norm of the largest alpha up to `largest` that distorts no more than DISTORTION; None below `smallest`."""
        # A layer whose latent is always zero must not divide by zero.
        fits = math.sqrt(DISTORTION * 2 * eps / max(mean_square, 1e-30))
        alpha = min(largest, 2.0 ** math.floor(math.log2(fits)))
        return cls(alpha, eps) if alpha >= smallest else None


@dataclass(frozen=True)
class LayerForm:
    """The form in which one layer's attention is exported.

    `slots`: place of each plane in the engine's RoPE table; `q_scale`: factor on queries that makes the engine's softmax
    scale the source's; `rope_scale`: factor on rotary logits (RoPE scalings such as YaRN); `residual`: factor on the residual
    stream.
    """

    sizes: Sizes
    slots: list[int]
    norm: LatentNorm
    q_scale: float
    rope_scale: float
    residual: float


@dataclass(frozen=True)
class Attention:
    """A converted layer's attention in its stored layout, float64. Shapes: see `MlaWeights`; m rotary planes."""

    q: Tensor  # (H, nope + 2m, d): content rows, then real and imaginary parts of the planes
    q_bias: Tensor | None  # (H, nope + 2m)
    kv_a: Tensor  # (r + 2m, d)
    kv_a_bias: Tensor | None  # (r + 2m,)
    kv_b: Tensor  # (H, nope + v, r)
    o: Tensor  # (d, H, v)
    o_bias: Tensor | None  # (d,)
    planes: int
    v_dim: int

    @classmethod
    def read(cls, stored: dict[str, Tensor], heads: int, v_dim: int) -> Attention:
        """From the tensors of one attention, by their local names."""
        wide = {name: tensor.double() for name, tensor in stored.items() if tensor.is_floating_point()}
        q_bias = wide.get("q_proj.bias")
        return cls(
            q=wide["q_proj.weight"].unflatten(0, (heads, -1)),
            q_bias=None if q_bias is None else q_bias.unflatten(0, (heads, -1)),
            kv_a=wide["kv_a_proj_with_mqa.weight"],
            kv_a_bias=wide.get("kv_a_proj_with_mqa.bias"),
            kv_b=wide["kv_b_proj.weight"].unflatten(0, (heads, -1)),
            o=wide["o_proj.weight"].unflatten(1, (heads, v_dim)),
            o_bias=wide.get("o_proj.bias"),
            planes=len(stored["rope_freq_index"]),
            v_dim=v_dim,
        )

    @property
    def rank(self) -> int:
        """kv_lora_rank of this layer."""
        return self.kv_b.shape[-1]

    @property
    def nope_dim(self) -> int:
        """qk_nope_head_dim of this layer."""
        return self.q.shape[1] - 2 * self.planes

    def largest_mean_square(self, norm_weight: Tensor, rank: int) -> float:
        """Upper bound of mean(c^2) over `rank` elements for every input, by the spectral norm of the down-projection.

        The input is the output of an RMSNorm: norm_weight * x with |x|^2 <= d.
        """
        rows = self.kv_a[: self.rank] * norm_weight.double()
        # By the Gram matrix (r, r), which is smaller than the rows (r, d); rounding can make its eigenvalue negative.
        size = (torch.linalg.eigvalsh(rows @ rows.T)[-1].clamp_min(0) * rows.shape[1]).sqrt()
        if self.kv_a_bias is not None:
            size = size + self.kv_a_bias[: self.rank].norm()
        return float(size.square()) / rank


def _place(rows: Tensor, planes: int, content: int, slots: list[int], size: int) -> Tensor:
    """Pad the content rows and interleave the rows of the planes.

    Args:
        rows: (..., content of this layer + 2m, n); the planes' real parts come before their imaginary parts.
        planes: m.
        content: rows of the result before the planes.
        slots: (m,); the plane in slot s gets the rows 2s and 2s + 1 after the content.
        size: rows of the result.

    Returns:
        (..., size, n).
    """
    width = rows.shape[-2] - 2 * planes
    place = rows.new_zeros(*rows.shape[:-2], size, rows.shape[-1])
    place[..., :width, :] = rows[..., :width, :]
    pairs = content + 2 * torch.tensor(slots, dtype=torch.int64)
    place[..., pairs, :] = rows[..., width : width + planes, :]
    place[..., pairs + 1, :] = rows[..., width + planes :, :]
    return place


def _queries(attention: Attention, form: LayerForm, rows: Tensor) -> Tensor:
    """Rows (H, nope + 2m, n) of the queries, scaled and in DeepSeek's order: (H, nope_dim + rope_dim, n)."""
    sizes, scaled = form.sizes, rows * form.q_scale
    scaled[:, attention.nope_dim :] *= form.rope_scale
    return _place(scaled, attention.planes, sizes.nope_dim, form.slots, sizes.nope_dim + sizes.rope_dim)


def _compressed(attention: Attention, form: LayerForm, rows: Tensor) -> Tensor:
    """Rows (r + 2m, n) of the down-projection, scaled and in DeepSeek's order: (cache_width, n)."""
    scaled = rows.clone()
    scaled[: attention.rank] *= form.norm.alpha
    return _place(scaled, attention.planes, form.sizes.rank, form.slots, form.sizes.cache_width)


def served_attention(attention: Attention, form: LayerForm) -> dict[str, Tensor]:
    """The layer's attention under DeepSeek's names, float64, in the sizes of `form`."""
    heads, sizes, norm = attention.q.shape[0], form.sizes, form.norm
    kv_b = attention.kv_b.new_zeros(heads, sizes.nope_dim + sizes.v_dim, sizes.rank)
    nope, rank, v_dim = attention.nope_dim, attention.rank, attention.v_dim
    kv_b[:, :nope, :rank] = attention.kv_b[:, :nope] * norm.remainder
    kv_b[:, sizes.nope_dim : sizes.nope_dim + v_dim, :rank] = attention.kv_b[:, nope:] * norm.remainder
    o = attention.o.new_zeros(attention.o.shape[0], heads, sizes.v_dim)
    o[..., :v_dim] = attention.o * form.residual
    served = {
        "q_proj.weight": _queries(attention, form, attention.q).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": _compressed(attention, form, attention.kv_a),
        "kv_a_layernorm.weight": torch.full((sizes.rank,), norm.gain, dtype=torch.float64),
        "kv_b_proj.weight": kv_b.flatten(0, 1),
        "o_proj.weight": o.flatten(1),
    }
    if attention.q_bias is not None:
        served["q_proj.bias"] = _queries(attention, form, attention.q_bias[..., None]).flatten()
    if attention.kv_a_bias is not None:
        served["kv_a_proj_with_mqa.bias"] = _compressed(attention, form, attention.kv_a_bias[:, None])[:, 0]
    if attention.o_bias is not None:
        served["o_proj.bias"] = attention.o_bias * form.residual
    return served
