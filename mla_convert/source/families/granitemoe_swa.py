"""Granite with sliding windows and a mixture of experts."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="granitemoe_swa",
    checkpoints="Granite Swash 3B-A600M",
    traits="multipliers as Granite; attention sinks; sliding windows; some layers without RoPE; mixture of experts",
    residual_multiplier="residual_multiplier",
    sinks="sinks",
    rope_layers="layer_rope_theta",
    tested={
        "granitemoe_swa": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "layer_rope_theta": [100.0, 0, 10000.0],
        }
    },
)
