"""Bamba, a hybrid: Mamba 2 in most layers, attention in the others."""

from mla_convert.source.families.base import Family
from mla_convert.source.families.granitemoehybrid import MAMBA_2

FAMILY = Family(
    model_type="bamba",
    checkpoints="Bamba 9B v1 and v2",
    traits="hybrid: one layer in ten has attention, the others Mamba 2; RoPE on half of a head",
    final_norm="final_layernorm",
    partial_rotary=True,
    other_layers=("linear_attention",),
    state_mixer="mamba",
    tested={"bamba": {**MAMBA_2, "attn_layer_indices": [0, 2], "attention_bias": True}},
)
