"""Granite with sliding windows."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="granite_swa",
    checkpoints="Granite Swash 2B",
    traits="multipliers as Granite; attention sinks; sliding windows; some layers without RoPE",
    residual_multiplier="residual_multiplier",
    sinks="sinks",
    rope_layers="layer_rope_theta",
    tested={
        "granite_swa": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "layer_rope_theta": [100.0, 0, 10000.0],
        }
    },
)
