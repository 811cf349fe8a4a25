"""Models with random weights and full caches to measure decoding on, and the bytes of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from mla_convert.modeling.configuration_mla import config_class
from mla_convert.modeling.modeling_mla import model_class
from mla_convert.source.families import FAMILIES
from mla_convert.source.load_model import PREFIX, is_converted
from mla_convert.source.shape import converted_layers, head_width, kv_heads


class FullLayer(DynamicLayer):
    """A full cache layer, whose last token each step overwrites in place.

    Args:
        keys: (batch, heads, tokens, width).
        values: (batch, heads, tokens, width).
    """

    def __init__(self, keys: Tensor, values: Tensor):
        """Hold keys and values."""
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.tokens_written = torch.tensor(keys.shape[2] - 1, device=keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new token; returns all keys and values."""
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before the new one."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.keys.shape[2], 0


class FullHybridLayer(LinearAttentionLayer, FullLayer):
    """A full cache layer of a model whose layers have attention and a recurrent mixer, whose state the first steps make."""

    def __init__(self, keys: Tensor, values: Tensor):
        """Hold keys and values."""
        FullLayer.__init__(self, keys, values)
        LinearAttentionLayer.__init__(self)
        self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the recurrent state."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


def cache_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """For each layer with attention: heads, and widths of the key slot and of the value slot."""
    layers = converted_layers(config)
    if is_converted(config):
        return [(1, config.layer_rank(layer), config.layer_rope_dim(layer)) for layer in layers]
    width = head_width(config)
    return [(kv_heads(config), width, width) for _ in layers]


def full_cache(config: PreTrainedConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache of `context` tokens, filled with normally distributed numbers; recurrent states begin with the first step."""

    def filled(heads: int, width: int) -> Tensor:
        return torch.empty(batch, heads, context, width, dtype=dtype, device=device).normal_()

    cache = DynamicCache(config=config)
    for index, (heads, k, v) in zip(converted_layers(config), cache_shapes(config), strict=True):
        kind = FullHybridLayer if isinstance(cache.layers[index], LinearAttentionLayer) else FullLayer
        cache.layers[index] = kind(filled(heads, k), filled(heads, v))
    return cache


def empty_cache(config: PreTrainedConfig) -> Cache:
    """A cache that grows; of a hybrid model, with the states of its other layers."""
    return DynamicCache(config=config) if is_hybrid(config) else DynamicCache()


def is_hybrid(config: PreTrainedConfig) -> bool:
    """Whether a stock or converted model has layers whose state does not grow with the context."""
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    return family is not None and family.state_mixer is not None


def held_bytes(device: torch.device, cache: Cache | None = None) -> int:
    """Bytes that the device's allocator has given out; on the CPU, which has no count, bytes of the cache's tensors."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    layers = cache.layers if cache is not None else ()
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(part.untyped_storage().nbytes() for part in held if part is not None)


def converted_config(original: PreTrainedConfig, rank: int, rope_dim: int) -> PreTrainedConfig:
    """Configuration of a conversion of the original to one rank and one number of rotary dimensions in all layers."""
    fields = original.to_dict()
    for key in ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype"):
        fields.pop(key, None)
    _, width, _ = cache_shapes(original)[0]
    if is_hybrid(original):
        family = FAMILIES[original.model_type]
        fields |= {
            "mla_layers": family.layers,
            "mla_attention": family.attention,
            "mla_converted_layers": list(converted_layers(original)),
            "mla_gate": family.gate,
            "mla_q_norm": family.q_norm,
            "mla_k_norm": family.k_norm,
            "mla_norm_over": family.qk_norm_shape,
        }
    return config_class(type(original))(
        **fields, kv_lora_rank=rank, qk_rope_head_dim=rope_dim, qk_nope_head_dim=width, v_head_dim=width,
        qk_head_dim=width + rope_dim,
    )  # fmt: skip


def shape_config(fields: Mapping[str, object]) -> PreTrainedConfig:
    """Configuration of a shape in `shapes.SHAPES`."""
    return AutoConfig.for_model(**fields)


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, original: PreTrainedConfig | None = None
) -> nn.Module:
    """A model with random weights, built on the device.

    Args:
        config: configuration of the model.
        dtype: of its weights.
        device: where to build it.
        original: configuration of the original, if `config` is that of a converted model.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if original is None:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            else:
                config._attn_implementation = "sdpa"
                model = model_class(AutoModelForCausalLM._model_mapping[type(original)])(config)
                for name, index in model.named_buffers():
                    if name.endswith("rope_freq_index"):
                        index.copy_(torch.arange(len(index)))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a decode step reads: all but the embedding, unless the head is tied to it."""
    every = sum(weight.nbytes for weight in model.parameters())
    tied = model.get_output_embeddings() is None or (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    return every - (0 if tied else model.get_input_embeddings().weight.nbytes)


def token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a token takes in the cache of all layers."""
    return sum(heads * (keys + values) for heads, keys, values in cache_shapes(config)) * dtype.itemsize
