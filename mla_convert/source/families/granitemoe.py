"""Granite 3 with a mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="granitemoe",
    checkpoints="Granite 3.0 and 3.1 1B-A400M and 3B-A800M",
    traits="multipliers as Granite; mixture of experts",
    residual_multiplier="residual_multiplier",
    renamed=(
        (".input_linear.weight", ".experts.gate_up_proj"),
        (".output_linear.weight", ".experts.down_proj"),
        (".router.layer.weight", ".router.weight"),
    ),
    tested={
        "granitemoe": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "num_local_experts": 4,
        }
    },
)
