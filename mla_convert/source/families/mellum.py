"""Mellum 2."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="mellum",
    checkpoints="Mellum 2 12B-A2.5B",
    traits="per-head norm of query and key; sliding windows with their own RoPE base; mixture of experts",
    q_norm="q_norm",
    k_norm="k_norm",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "mellum": {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
        },
    },
)
