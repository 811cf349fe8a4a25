"""DeepSeek-V3 with the properties of converted models that the stock class lacks.

These are biases, another softmax scale, rotary frequencies that differ by layer, and norms on queries and keys. The file needs
only torch and transformers (5.15 or newer). vLLM (0.28 or newer, with --trust-remote-code) runs it by its transformers
backend, which recognises latent attention by its structure and replaces it by its own kernels: names, the norm on the latent
and the inherited forward must not change.
"""

import inspect

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, DeepseekV3Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)

# The stock attention's argument for its cache in the installed version, and other arguments that a layer may pass: they have no
# effect here, or the attention function reads them.
CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(DeepseekV3Attention.forward).parameters)
LEFT_TO_OTHERS = frozenset(
    ["position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "return_dict",
     "output_router_logits", "num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
     "attention_instances"]
)  # fmt: skip


class MlaServedLatentNorm(DeepseekV3RMSNorm):
    """A norm that is the identity: its epsilon is so large that it divides by a constant, and its weight is that constant."""


class MlaServedAttention(DeepseekV3Attention):
    """DeepSeek-V3's attention with the biases and the softmax scale of the converted model."""

    def __init__(self, config, layer_idx):
        """Replace the stock projections and the latent norm."""
        super().__init__(config, layer_idx)
        heads, hidden = self.num_heads, config.hidden_size
        compressed = config.kv_lora_rank + config.qk_rope_head_dim
        self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.mla_q_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, compressed, bias=config.mla_kv_bias)
        self.kv_a_layernorm = MlaServedLatentNorm(config.kv_lora_rank, eps=config.mla_latent_eps)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.mla_o_bias)
        self.scaling = config.mla_softmax_scale


class MlaServedFeatures(nn.Module):
    """The input of latent attention: normed queries and keys, and values.

    They come from one projection, not three, so that engines do not shard it over devices.
    """

    def __init__(self, config):
        """Make the projection and the norms of one layer."""
        super().__init__()
        self.head_dim = config.mla_head_dim
        self.sizes = [count * self.head_dim for count in config.mla_feature_heads]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.mla_feature_bias)
        self.q_norm = DeepseekV3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = DeepseekV3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden_states):
        """Map hidden states (B, T, hidden) to normed queries (B, T, H * d_h) and [normed keys; values] (B, T, 2 G * d_h)."""
        query, key, value = self.qkv_proj(hidden_states).split(self.sizes, dim=-1)
        query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return query, torch.cat([key, value], dim=-1)


class MlaServedNormedAttention(MlaServedAttention):
    """The same attention on `MlaServedFeatures`. Each head's query depends on that head's features: q_proj is block diagonal."""

    def __init__(self, config, layer_idx):
        """Replace the projections by maps of features."""
        super().__init__(config, layer_idx)
        heads, keys, values = (count * config.mla_head_dim for count in config.mla_feature_heads)
        compressed = config.kv_lora_rank + config.qk_rope_head_dim
        self.q_proj = nn.Linear(heads, self.num_heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(keys + values, compressed, bias=False)

    def forward(self, query, key_value, position_embeddings, attention_mask=None, **kwargs):
        """Map features of queries (B, T, H * d_h) and of keys and values to the output (B, T, hidden); also the weights."""
        cache = kwargs.pop(CACHE, None)
        for name, value in kwargs.items():
            if not (value is None or value is False or name in LEFT_TO_OTHERS):
                raise TypeError(f"attention of a converted model was given {name}, which its code does not know")
        batch, length = query.shape[:-1]
        q_states = self.q_proj(query).view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = torch.split(q_states, [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(key_value)
        latent, k_rot = torch.split(compressed, [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        latent = latent.view(batch, 1, length, self.kv_lora_rank)
        k_rot = k_rot.view(batch, 1, length, self.qk_rope_head_dim)
        cos, sin = position_embeddings
        q_rot, k_rot = apply_rotary_pos_emb_interleave(q_rot, k_rot, cos, sin)
        if cache is not None:
            latent, k_rot = cache.update(latent, k_rot, self.layer_idx)
        query_states = torch.cat((q_pass, q_rot), dim=-1)
        key_states, value_states = self.expand_kv(latent, k_rot)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(batch, length, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class MlaServedRotaryEmbedding(DeepseekV3RotaryEmbedding):
    """Angles of all layers' tables in sequence, each table twice as in the stock class: (B, T, tables * 2m)."""

    @staticmethod
    def compute_default_rope_parameters(config, *_, **__):
        """Frequencies (tables * 2m,) in radians per position, and a scaling factor of 1."""
        tables = torch.tensor(config.mla_inv_freq, dtype=torch.float)
        return torch.cat([tables, tables], dim=-1).flatten(), 1.0

    @torch.no_grad()
    def forward(self, x, position_ids):
        """Cosines and sines for position_ids (B, T), in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class MlaServedDecoderLayer(DeepseekV3DecoderLayer):
    """The stock layer with the attention above, which gets its layer's part of the table."""

    def __init__(self, config, layer_idx):
        """Make the layer's attention and find its part of the table."""
        super().__init__(config, layer_idx)
        self.normed = config.mla_feature_heads is not None
        self.self_attn = (MlaServedNormedAttention if self.normed else MlaServedAttention)(config, layer_idx)
        self.features = MlaServedFeatures(config) if self.normed else None
        table = layer_idx if len(config.mla_inv_freq) > 1 else 0
        self.first_angle = table * config.qk_rope_head_dim
        self.last_angle = self.first_angle + config.qk_rope_head_dim

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        """Map hidden states (B, T, hidden) to the same shape."""
        own = tuple(table[..., self.first_angle : self.last_angle] for table in position_embeddings)
        if not self.normed:
            return super().forward(hidden_states, position_embeddings=own, **kwargs)
        query, key_value = self.features(self.input_layernorm(hidden_states))
        attended, _ = self.self_attn(query, key_value, position_embeddings=own, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _padding(config):
    # config.json has a padding token outside the vocabulary, so that the stock class, which lacks biases, cannot be built
    config.pad_token_id = config.mla_pad_token_id
    return config


class MlaServedModel(DeepseekV3Model):
    """DeepSeek-V3's decoder with the layers above."""

    _no_split_modules = ["MlaServedDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MlaServedDecoderLayer, "attentions": MlaServedAttention}  # noqa: RUF012

    def __init__(self, config):
        """Make the decoder's layers and RoPE tables."""
        super().__init__(_padding(config))
        self.layers = nn.ModuleList(MlaServedDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = MlaServedRotaryEmbedding(config)
        self.post_init()


class MlaServedForCausalLM(DeepseekV3ForCausalLM):
    """The causal language model of `MlaServedModel`."""

    _no_split_modules = ["MlaServedDecoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        """Make the model and its head."""
        super().__init__(_padding(config))
        self.model = MlaServedModel(config)
        self.post_init()
