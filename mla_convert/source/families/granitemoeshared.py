"""Granite 3 with a mixture of experts beside a shared one."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="granitemoeshared",
    checkpoints="Granite with a shared expert",
    traits="multipliers as Granite; mixture of experts beside a shared one",
    residual_multiplier="residual_multiplier",
    renamed=(
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        (".router.layer.weight", ".router.weight"),
    ),
    tested={
        "granitemoeshared": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
        }
    },
)
