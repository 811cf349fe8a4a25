"""HunYuan 1, dense."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    checkpoints="Hunyuan 0.5B, 1.8B, 4B and 7B",
    traits="per-head norm of query and key after RoPE: rotated queries are multiplied by the product of the weights",
    q_norm="query_layernorm",
    k_norm="key_layernorm",
    norm_after_rope=True,
    tested={
        "hunyuan_v1_dense": {
            "head_dim": 8,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
        },
        "hunyuan_v1_dense-mha": {"head_dim": 16, "num_key_value_heads": 6},
    },
)
