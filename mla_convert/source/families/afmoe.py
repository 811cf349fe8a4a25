"""AFMoE: Trinity."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="afmoe",
    checkpoints="Trinity Nano and Mini",
    traits="per-head norm of query and key; a gate on the attention's output; RoPE only in sliding-window layers; norm after "
    "attention; mixture of experts beside shared ones",
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    gate="gate_proj",
    rope_layer_type="sliding_attention",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "afmoe": {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "mup_enabled": True,
        },
    },
)
