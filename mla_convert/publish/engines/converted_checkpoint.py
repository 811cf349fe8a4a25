"""Access to a converted folder for the exporter: configuration, constants of its modules, tensors by layer."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from mla_convert.core.errors import InputError
from mla_convert.publish.engines.latent_attention import Attention
from mla_convert.publish.engines.profiles import ModelTraits, Profile, check_family, check_profile_of, needs_code
from mla_convert.publish.engines.qk_norm import QKNormFeatures
from mla_convert.source.checkpoint.reader import SafetensorsReader, check_finite
from mla_convert.source.load_model import PREFIX, is_converted
from mla_convert.source.source import load_config

PROJECTIONS = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
NORMED = (*PROJECTIONS, "k_proj", "v_proj", "q_norm", "k_norm", "q_b_proj")
KEPT = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)  # fmt: skip
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Converted:
    """A converted folder that a profile supports."""

    def __init__(self, folder: Path, profile: Profile):
        """Open a folder.

        Raises:
            InputError: no converted model, or one that the profile does not support.
        """
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} has no config.json: give the folder of a converted model")
        self.folder, self.label = folder, folder.resolve().name
        self.config = load_config(folder, self.label)
        if not is_converted(self.config):
            raise InputError(
                f"{self.label} is of model type {self.config.model_type!r}, which is no converted model's: convert it first"
            )
        if getattr(self.config, "latent_cache", None):
            raise InputError(
                f"{self.label} has a quantised cache, and engines quantise theirs by an option of their own: "
                f"`mla-convert quantize {self.label} --cache-dtype bf16` comes first"
            )
        check_family(self.config, self.config.model_type.removeprefix(PREFIX), self.label)
        biases = self.config.mla_q_bias or self.config.mla_kv_bias or self.config.mla_o_bias
        reason = needs_code(self.config, biases, self.config.mla_q_norm is not None)
        check_profile_of(profile, reason, self.label)
        self.layers = range(self.config.num_hidden_layers)
        self.reader = SafetensorsReader(folder)
        self._check_names()
        self.traits = self._traits()

    def _check_names(self) -> None:
        parts = NORMED if self.config.mla_q_norm else PROJECTIONS
        attention = [f"self_attn.{name}" for name in (*(f"{part}.weight" for part in parts), "rope_freq_index")]
        needed = {f"model.layers.{index}.{name}" for index in self.layers for name in (*KEPT, *attention)}
        needed |= {EMBEDDING, NORM} | (set() if self.config.tie_word_embeddings else {HEAD})
        biases = {f"model.layers.{index}.self_attn.{part}.bias" for index in self.layers for part in parts}
        stored = set(self.reader.names())
        if missing := sorted(needed - stored):
            raise InputError(f"tensor {missing[0]} is missing from {self.label}: convert the model again")
        if foreign := sorted(stored - needed - biases - {HEAD}):
            raise InputError(
                f"tensor {foreign[0]} of {self.label} has no place in DeepSeek's model: serve it with transformers"
            )

    def _traits(self) -> ModelTraits:
        # Buffers keep their values: RoPE's frequencies are read from them.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        rotary = model.model.rotary_emb
        return ModelTraits(
            theta=float((getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 1e4)),
            inv_freq=tuple(rotary.inv_freq.tolist()),
            # The model multiplies both query and key by it, and their product has the square.
            rope_scale=float(rotary.attention_scaling) ** 2,
            softmax_scale=float(model.model.layers[0].self_attn.scaling),
        )

    def planes(self) -> list[list[int]]:
        """For each layer, the frequency index of each rotary plane."""
        names = [f"model.layers.{index}.self_attn.rope_freq_index" for index in self.layers]
        indices = self.reader.read(names)
        return [indices[name].tolist() for name in names]

    def layer(self, index: int) -> tuple[Attention, QKNormFeatures | None, dict[str, Tensor]]:
        """A layer's attention, its norms of queries and keys if it has them, and its other tensors by local names."""
        prefix = f"model.layers.{index}."
        tensors = self.reader.read(name for name in self.reader.names() if name.startswith(prefix))
        check_finite(tensors)
        local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        inside = {
            name.removeprefix("self_attn."): local.pop(name) for name in [*local] if name.startswith("self_attn.")
        }
        features = QKNormFeatures.take(inside) if self.config.mla_q_norm else None
        return Attention.read(inside, self.config.num_attention_heads, self.config.v_head_dim), features, local

    def largest_latent(self, index: int, rank: int) -> float:
        """Upper bound of the mean square of a layer's latent over `rank` elements, for any input."""
        attention, features, rest = self.layer(index)
        weight = rest["input_layernorm.weight"]
        if features:
            return features.largest_mean_square(attention, weight, rank)
        return attention.largest_mean_square(weight, rank)

    def largest_writing_weight(self) -> float:
        """Largest magnitude among the weights that write to the residual stream."""
        parts = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        names = [EMBEDDING, *(f"model.layers.{index}.{part}" for index in self.layers for part in parts)]
        return max(float(self.reader.read([name])[name].abs().max()) for name in names)
