"""Jamba, a hybrid: Mamba in most layers, attention without RoPE in the others; mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="jamba",
    checkpoints="Jamba 1.5 to 1.7, Jamba Reasoning 3B",
    traits="hybrid: one layer in eight has attention, the others Mamba; no RoPE",
    final_norm="final_layernorm",
    other_layers=("linear_attention",),
    state_mixer="mamba",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    },
)
