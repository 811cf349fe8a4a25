"""Gemma 3, its text models."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="gemma3_text",
    checkpoints="Gemma 3 270M and 1B",
    traits="per-head norm of query and key; sliding windows in most layers, with their own RoPE base; norm after attention",
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    requires={"use_bidirectional_attention": False},
    tested={
        "gemma3": {
            "head_dim": 8,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
        }
    },
)
