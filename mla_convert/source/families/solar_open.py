"""Solar Open."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="solar_open",
    checkpoints="Solar Open 100B",
    traits="mixture of experts beside a shared one",
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "solar_open": {
            "head_dim": 16,
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    },
)
