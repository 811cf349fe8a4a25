"""Flint."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="flint",
    checkpoints="Flint",
    traits="per-head norm of query and key; attention sinks; RoPE only in sliding-window layers; mixture of experts beside a "
    "shared one",
    q_norm="q_norm",
    k_norm="k_norm",
    sinks="sinks",
    rope_layer_type="sliding_attention",
    renamed=((".self_attn.softmax_offset", ".self_attn.sinks"),),
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "flint": {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    },
)
