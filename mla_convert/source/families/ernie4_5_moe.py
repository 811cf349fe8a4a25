"""ERNIE 4.5 with a mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="ernie4_5_moe",
    checkpoints="ERNIE 4.5 21B-A3B and 300B-A47B",
    traits="RoPE on adjacent dims; mixture of experts beside shared ones",
    interleaved=True,
    renamed=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    experts=("gate_proj", "up_proj", "down_proj"),
    tested={
        "ernie4_5_moe": {"use_bias": True, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    },
)
