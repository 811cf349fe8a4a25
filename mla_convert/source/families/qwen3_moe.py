"""Qwen3-MoE."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="qwen3_moe",
    checkpoints="Qwen3-30B-A3B, Qwen3-235B-A22B",
    traits="per-head norm of query and key; mixture of experts",
    q_norm="q_norm",
    k_norm="k_norm",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "qwen3-moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
)
