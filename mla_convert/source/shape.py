"""The shape of a source's attention: what its cache holds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionShape:
    """Shape of a source's attention. `has_kv_bias`: a bias on its key or value projection.

    `rotary_dim`: dims of a head that RoPE turns, where that is not all of them; `rope_layers`: which layers have RoPE,
    where not all do; `normed`: a norm stands between key projection and attention.
    """

    layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_kv_bias: bool = False
    rotary_dim: int | None = None
    rope_layers: tuple[bool, ...] | None = None
    normed: bool = False

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer by the source: keys and values of all kv heads."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def full_rope_dim(self) -> int:
        """Rotary dims when every plane keeps RoPE."""
        return self.num_kv_heads * (self.head_dim if self.rotary_dim is None else self.rotary_dim)

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has RoPE."""
        return self.rope_layers is None or self.rope_layers[layer]

    def full_rank(self, rope_dim: int) -> int:
        """Rank at which nothing is lost: the features left, or the inputs they are linear in if those are fewer."""
        features = self.cache_width - rope_dim
        return features if self.normed else min(features, self.hidden_size + self.has_kv_bias)


def head_width(config: PreTrainedConfig) -> int:
    """Dims of a head: the stream's share of one where a family knows no other number."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values: as many as query heads where a family knows no other number."""
    groups = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if groups is None else groups


def original_cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes a token that the original of a converted model caches, from the fields that its configuration keeps."""
    return 2 * kv_heads(config) * head_width(config) * config.num_hidden_layers * itemsize
