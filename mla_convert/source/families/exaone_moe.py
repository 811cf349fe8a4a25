"""EXAONE 4 with a mixture of experts (K-EXAONE)."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="exaone_moe",
    checkpoints="K-EXAONE 236B-A23B",
    traits="per-head norm of query and key; RoPE only in sliding-window layers; mixture of experts beside a shared one",
    q_norm="q_norm",
    k_norm="k_norm",
    rope_layer_type="sliding_attention",
    rope_layer_type_needs="sliding_window",
    renamed=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "exaone_moe": {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    },
)
