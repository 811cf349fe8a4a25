"""A converted model as DeepSeek-V3 with three things that the stock class cannot say: biases, a softmax scale of its own, and
rotary frequencies of its own in every layer.

Needs only torch and transformers (5.15 or newer). vLLM (0.28 or newer, with --trust-remote-code) runs it through its
transformers backend, which finds latent attention in it by its shape and replaces it by its own kernels: names, the norm
on the latent and the inherited forward must stay what they are.
"""

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM, DeepseekV3Model
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)


class MlaServedLatentNorm(DeepseekV3RMSNorm):
    """Its epsilon is so large that it only divides by a constant, which its weight multiplies back: the identity."""


class MlaServedAttention(DeepseekV3Attention):
    """DeepSeek-V3's attention with the biases and the softmax scale of the model that was converted."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads, hidden = self.num_heads, config.hidden_size
        compressed = config.kv_lora_rank + config.qk_rope_head_dim
        self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.mla_q_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, compressed, bias=config.mla_kv_bias)
        self.kv_a_layernorm = MlaServedLatentNorm(config.kv_lora_rank, eps=config.mla_latent_eps)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.mla_o_bias)
        self.scaling = config.mla_softmax_scale


class MlaServedRotaryEmbedding(DeepseekV3RotaryEmbedding):
    """Angles of all layers' tables one after another, each table twice as the stock class has it: (B, T, tables * 2m)."""

    @staticmethod
    def compute_default_rope_parameters(config, **_):
        """inv_freq (tables * 2m,) in radians per position, and no scaling."""
        tables = torch.tensor(config.mla_inv_freq, dtype=torch.float)
        return torch.cat([tables, tables], dim=-1).flatten(), 1.0

    @torch.no_grad()
    def forward(self, x, position_ids):
        """cos and sin for position_ids (B, T), in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class MlaServedDecoderLayer(DeepseekV3DecoderLayer):
    """The stock layer with the attention above, which gets its own part of the table."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = MlaServedAttention(config, layer_idx)
        table = layer_idx if len(config.mla_inv_freq) > 1 else 0
        self.first_angle = table * config.qk_rope_head_dim
        self.last_angle = self.first_angle + config.qk_rope_head_dim

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        """hidden_states (B, T, hidden) -> the same shape."""
        own = tuple(table[..., self.first_angle : self.last_angle] for table in position_embeddings)
        return super().forward(hidden_states, position_embeddings=own, **kwargs)


def _padding(config):
    # config.json names a padding token that does not exist, so that nobody builds the stock class, which has no biases
    config.pad_token_id = config.mla_pad_token_id
    return config


class MlaServedModel(DeepseekV3Model):
    """DeepSeek-V3's decoder of the layers above."""

    _no_split_modules = ["MlaServedDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": MlaServedDecoderLayer, "attentions": MlaServedAttention}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(_padding(config))
        self.layers = nn.ModuleList(MlaServedDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = MlaServedRotaryEmbedding(config)
        self.post_init()


class MlaServedForCausalLM(DeepseekV3ForCausalLM):
    """The causal language model."""

    _no_split_modules = ["MlaServedDecoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(_padding(config))
        self.model = MlaServedModel(config)
        self.post_init()
