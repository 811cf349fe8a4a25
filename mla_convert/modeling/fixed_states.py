"""Bytes of the cached states that do not grow with the context: those of recurrent and convolution layers in hybrid models."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from mla_convert.modeling.configuration_mla import MODEL_TYPE
from mla_convert.modeling.stock_mla import cache_names
from mla_convert.source.families import DECODER, FAMILIES


def fixed_state_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one sequence's states that do not grow with the context; 0 for a model of attention layers alone.

    Every such layer's mixer runs on one token on the meta device, so that the states have the shapes and dtypes that the
    installed transformers gives them.

    Args:
        config: of a stock or a converted model.
        dtype: of the model.
    """
    family = FAMILIES.get(config.get_text_config().model_type.removeprefix(MODEL_TYPE))
    if family is None or family.state_mixer is None:
        return 0
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cache, text = DynamicCache(config=config), config.get_text_config()
    token = torch.empty(1, 1, text.hidden_size, dtype=dtype, device="meta")
    layers = family.layers if text is config else f"{DECODER}.layers"
    for index, layer in enumerate(model.get_submodule(layers)):
        mixer = getattr(layer, family.state_mixer, None)
        if hasattr(cache.layers[index], "conv_states") and mixer is not None:
            for argument in cache_names(type(mixer)):  # none: an MLP in a mixer's place
                mixer(token, **{argument: cache})
    return held_state_bytes(cache)


def held_state_bytes(cache: DynamicCache) -> int:
    """Bytes of all states in a cache that do not grow with the context."""
    states = [getattr(layer, name, {}) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
    return sum(state.nbytes for by_index in states for state in by_index.values() if state is not None)
