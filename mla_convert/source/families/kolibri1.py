"""Kolibri 1."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="kolibri1",
    checkpoints="Kolibri 1",
    traits="per-head norm of query and key; RoPE only in sliding-window layers; norm after attention; mixture of experts beside "
    "a shared one",
    output_norm="post_self_attn_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    rope_layer_type="sliding_attention",
    rope_layer_type_needs="sliding_window",
    renamed=(
        (".moe.router.expert_bias", ".mlp.gate.e_score_correction_bias"),
        (".post_attn_norm.", ".post_self_attn_layernorm."),
        (".post_ffn_norm.", ".post_mlp_layernorm."),
    ),
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "kolibri1": {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    },
)
