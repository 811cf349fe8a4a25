"""Qwen3-Next, a hybrid: three layers of gated delta net (linear attention) to one of gated attention; mixture of experts."""

from mla_convert.source.families.base import Family

GATED = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}

FAMILY = Family(
    model_type="qwen3_next",
    checkpoints="Qwen3-Next 80B-A3B",
    traits="hybrid: one layer in four has attention; gated output; per-head norm of query and key; RoPE on a quarter of a head",
    q_norm="q_norm",
    k_norm="k_norm",
    gate="q_proj",
    partial_rotary=True,
    other_layers=("linear_attention",),
    state_mixer="linear_attn",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "qwen3-next": {
            **GATED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    },
)
