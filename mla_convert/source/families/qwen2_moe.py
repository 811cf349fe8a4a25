"""Qwen2-MoE and Qwen1.5-MoE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="qwen2_moe",
    checkpoints="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    traits="bias on query, key and value; mixture of experts beside a shared one",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "qwen2-moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
    },
)
