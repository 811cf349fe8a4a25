"""Models with random weights and full caches to measure decoding on, and the bytes of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from mla_convert.core.errors import InputError
from mla_convert.modeling.configuration_mla import config_class
from mla_convert.modeling.latent_format_mla import VERSION, LatentFormat, layer_format
from mla_convert.modeling.modeling_mla import model_class
from mla_convert.modeling.quantised_latent_mla import quantise_rows
from mla_convert.source.families import FAMILIES
from mla_convert.source.load_model import PREFIX, is_converted
from mla_convert.source.shape import cache_heads, converted_layers


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
        # By this name the fused write of a converted model finds its position on the device, as in a static cache.
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


# Formats of a random conversion's cache, as `convert --cache-dtype` chooses them.
CACHE_DTYPES = {
    "bf16": None,
    "fp8": {"version": VERSION, "kind": "fp8", "group": 0, "rope": "fp8"},
    "int8": {"version": VERSION, "kind": "int8", "group": 64, "rope": "fp8"},
    "int4": {"version": VERSION, "kind": "int4", "group": 64, "rope": "fp8"},
}
# Tokens whose random rows a quantised cache repeats: quantising a whole cache would take many times its bytes.
DISTINCT_ROWS = 1024


def packed_formats(config: PreTrainedConfig) -> list[LatentFormat | None]:
    """For each layer with attention: the format of its packed rows; None where the cache holds numbers."""
    converted = is_converted(config)
    return [layer_format(config, layer) if converted else None for layer in converted_layers(config)]


def cache_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """For each layer with attention: heads, and widths of the key slot and of the value slot, in bytes where rows are packed."""
    layers = converted_layers(config)
    if is_converted(config):
        formats = packed_formats(config)
        if formats[0] is not None:
            return [(1, fmt.row_bytes, 0) for fmt in formats]
        return [(1, config.layer_rank(layer), config.layer_rope_dim(layer)) for layer in layers]
    return [(heads, width, width) for heads, width in cache_heads(config)]


def full_cache(config: PreTrainedConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Cache:
    """A cache of `context` tokens, filled with normally distributed numbers; recurrent states begin with the first step."""

    def filled(heads: int, width: int) -> Tensor:
        return torch.empty(batch, heads, context, width, dtype=dtype, device=device).normal_()

    def packed(fmt: LatentFormat) -> tuple[Tensor, Tensor]:
        numbers = (torch.randn(DISTINCT_ROWS, width, device=device) for width in (fmt.rank, fmt.rope_dim))
        some = quantise_rows(fmt, *numbers)
        rows = torch.empty(batch, 1, context, fmt.row_bytes, dtype=torch.uint8, device=device)
        for first in range(0, context, DISTINCT_ROWS):
            rows[:, :, first : first + DISTINCT_ROWS] = some[: context - first]
        return rows, rows.new_empty(batch, 1, context, 0)

    cache = DynamicCache(config=config)
    shapes = zip(converted_layers(config), packed_formats(config), cache_shapes(config), strict=True)
    for index, fmt, (heads, k, v) in shapes:
        kind = FullHybridLayer if isinstance(cache.layers[index], LinearAttentionLayer) else FullLayer
        cache.layers[index] = kind(*(packed(fmt) if fmt is not None else (filled(heads, k), filled(heads, v))))
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


def converted_config(
    original: PreTrainedConfig, rank: int, rope_dim: int, cache_dtype: str = "bf16", nope_dim: int | None = None
) -> PreTrainedConfig:
    """Configuration of a conversion of the original to one rank and one number of rotary dimensions in all layers.

    Args:
        original: configuration of the original.
        rank: of every layer.
        rope_dim: numbers of a rotary key.
        cache_dtype: of CACHE_DTYPES.
        nope_dim: content dims of a head; None: all.

    Raises:
        InputError: its layers cannot have one size.
    """
    family = FAMILIES.get(original.model_type)
    if family is not None and (family.heads_by_layer or family.shared):
        raise InputError(
            f"layers of {original.model_type} have unlike sizes: bench a converted folder instead of random weights"
        )
    fields = original.to_dict()
    # These name the original's class and origin.
    for key in ("model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "dtype"):
        fields.pop(key, None)
    _, width, _ = cache_shapes(original)[0]
    nope_dim = width if nope_dim is None else nope_dim
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
        **fields, kv_lora_rank=rank, qk_rope_head_dim=rope_dim, qk_nope_head_dim=nope_dim, v_head_dim=width,
        qk_head_dim=nope_dim + rope_dim, latent_cache=CACHE_DTYPES[cache_dtype],
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
                    # A conversion gives every plane its frequency; the buffer begins with zeros.
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
    itemsize = 1 if packed_formats(config)[0] is not None else dtype.itemsize
    return sum(heads * (keys + values) for heads, keys, values in cache_shapes(config)) * itemsize
