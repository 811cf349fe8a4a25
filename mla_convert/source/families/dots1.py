"""dots.llm1."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="dots1",
    checkpoints="dots.llm1",
    traits="per-head norm of query and key; mixture of experts beside shared ones",
    q_norm="q_norm",
    k_norm="k_norm",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "dots1": {
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
)
