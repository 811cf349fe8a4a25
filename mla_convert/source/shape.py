"""The shape of a source's attention, which determines the size of its cache. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mla_convert.source.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LayerHeads:
    """Keys and values of one layer, where layers differ in them; `rotary_dim` and `one_projection` as in `AttentionShape`."""

    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    one_projection: bool = False


@dataclass(frozen=True)
class AttentionShape:
    """Shape of a source's attention.

    `layers`: all decoder layers; `converted`: indices of those with attention, the only ones that are converted (None: all);
    `has_kv_bias`: its key or value projection has a bias; `rotary_dim`: dims of a head that RoPE rotates (None: all);
    `rope_layers`: whether each layer has RoPE (None: all have it); `normed`: there is a norm between the key projection and
    attention; `one_projection`: values are the output of the key projection, so that keys are a linear map of normed values;
    `heads`: of each layer where layers differ, and the fields above are then those of the first layer; `latent_of`: the layer
    whose keys and values each layer attends to (None: its own).
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
    converted: tuple[int, ...] | None = None
    one_projection: bool = False
    heads: tuple[LayerHeads, ...] | None = None
    latent_of: tuple[int, ...] | None = None

    def of(self, layer: int) -> AttentionShape:
        """The shape of a model whose layers are all like this one."""
        if self.heads is None:
            return self
        own = self.heads[layer]
        return replace(
            self,
            num_kv_heads=own.num_kv_heads,
            head_dim=own.head_dim,
            rotary_dim=own.rotary_dim,
            one_projection=own.one_projection,
            heads=None,
        )

    @property
    def cache_widths(self) -> list[int]:
        """Elements that the source caches per token, for each layer that has a cache."""
        return [self.of(layer).cache_width for layer in self.caching_layers]

    @property
    def caching_layers(self) -> tuple[int, ...]:
        """Indices of the layers with attention that have keys and values of their own."""
        return tuple(layer for layer in self.converted_layers if self.source_of(layer) == layer)

    def source_of(self, layer: int) -> int:
        """The layer whose keys and values, or latent, a layer attends to."""
        return layer if self.latent_of is None else self.latent_of[layer]

    def readers_of(self, layer: int) -> tuple[int, ...]:
        """The layers that attend to the keys and values, or the latent, of a layer: itself and later ones."""
        return tuple(reader for reader in self.converted_layers if self.source_of(reader) == layer)

    @property
    def converted_layers(self) -> tuple[int, ...]:
        """Indices of the layers with attention: these are converted, and the others stay as they are."""
        return tuple(range(self.layers)) if self.converted is None else self.converted

    @property
    def cache_width(self) -> int:
        """Elements that the source caches per token and layer: keys and values of all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def full_rope_dim(self) -> int:
        """Rotary dims of a layer that keeps all rotary frequencies of all KV heads."""
        return self.num_kv_heads * (self.head_dim if self.rotary_dim is None else self.rotary_dim)

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has RoPE."""
        return self.rope_layers is None or self.rope_layers[layer]

    def full_rank(self, rope_dim: int) -> int:
        """Rank of an exact factorisation: the number of features without RoPE, or of their inputs if that is smaller."""
        features = self.cache_width // 2 if self.one_projection else self.cache_width - rope_dim
        # Features are linear in the layer's input, and a bias adds one direction. Behind a norm they are not.
        return features if self.normed else min(features, self.hidden_size + self.has_kv_bias)


def _first(config: PreTrainedConfig) -> PreTrainedConfig:
    """The first layer's configuration where layers differ: the whole then has no value of what differs."""
    return config.per_layer_config[0] if getattr(config, "is_heterogeneous", False) else config


def head_width(config: PreTrainedConfig) -> int:
    """Dims of a head: `head_dim`, or the residual stream's width divided by the number of heads; the first layer's."""
    config = _first(config)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: PreTrainedConfig) -> int:
    """Number of KV heads; the number of query heads if the configuration has no other. The first layer's."""
    config = _first(config)
    if getattr(config, "new_decoder_architecture", False):  # Falcon's 40B and later
        return config.num_kv_heads
    if getattr(config, "multi_query", False):  # Falcon 7B, StarCoder 1
        return 1
    groups = getattr(config, "num_key_value_heads", None)
    return config.num_attention_heads if groups is None else groups


def attention_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers with attention, of a stock or a converted model's configuration."""
    config = config.get_text_config()
    if hasattr(config, "mla_converted_layers"):
        return tuple(config.converted_layers())
    family = FAMILIES.get(config.model_type)
    layers = family.converted_layers(config) if family else None
    return tuple(range(config.num_hidden_layers)) if layers is None else layers


def converted_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers that cache keys and values, or latents, of a stock or a converted model's configuration."""
    config = config.get_text_config()
    family = FAMILIES.get(config.model_type.removeprefix("mla_"))
    source = family.latent_of(config) if family else None
    return tuple(layer for layer in attention_layers(config) if source is None or source[layer] == layer)


def layer_heads(config: PreTrainedConfig, family: Family) -> tuple[LayerHeads, ...] | None:
    """Keys and values of each layer; None if the family's layers are all alike."""
    if not family.heads_by_layer:
        return None
    one_projection = bool(family.one_projection and getattr(config, family.one_projection))

    def heads(layer: int, kind: str) -> LayerHeads:
        own = config.per_layer_config[layer]
        rope = config.rope_parameters[kind] or {}
        share = rope.get("partial_rotary_factor", 1.0) if rope.get("rope_type") == "proportional" else 1.0
        rotary_dim = 2 * int(share * own.head_dim // 2)
        return LayerHeads(
            own.num_key_value_heads, own.head_dim, rotary_dim, one_projection and kind == "full_attention"
        )

    return tuple(heads(layer, kind) for layer, kind in enumerate(config.layer_types))


def cache_heads(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """KV heads and their width in the original's cache, for each layer that caches keys and values or latents.

    Args:
        config: of a stock or a converted model.
    """
    family = FAMILIES.get(config.get_text_config().model_type.removeprefix("mla_"))
    by_layer = layer_heads(config.get_text_config(), family) if family else None
    if by_layer is None:
        return [(kv_heads(config), head_width(config))] * len(converted_layers(config))
    return [(by_layer[layer].num_kv_heads, by_layer[layer].head_dim) for layer in converted_layers(config)]


def original_cache_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes per token of the original's cache, from a converted model's configuration; `itemsize`: bytes of an element."""
    return sum(2 * heads * width for heads, width in cache_heads(config)) * itemsize
