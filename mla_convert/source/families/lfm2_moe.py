"""LFM2 with a mixture of experts."""

from dataclasses import replace

from mla_convert.source.families.lfm2 import FAMILY as LFM2

FAMILY = replace(
    LFM2,
    model_type="lfm2_moe",
    checkpoints="LFM2 8B-A1B and 24B-A2B",
    traits="as lfm2; mixture of experts",
    experts=("w1", "w3", "w2"),
    tested={
        "lfm2-moe": {
            "layer_types": ["conv", "full_attention", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    },
)
