"""GLM-4.5 and GLM-4.6."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="glm4_moe",
    checkpoints="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    traits="RoPE on half a head; bias on query, key and value; per-head norm of query and key in the largest; mixture of "
    "experts beside a shared one",
    partial_rotary=True,
    q_norm="q_norm",
    k_norm="k_norm",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "glm4_moe": {
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        "glm4_moe-air": {
            "head_dim": 16,
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    },
)
