"""EXAONE 4.0: the 32B has RoPE in its sliding-window layers alone, the 1.2B in all."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="exaone4",
    checkpoints="EXAONE 4.0 1.2B and 32B",
    traits="per-head norm of query and key; norm after attention, none before it; with sliding windows, RoPE only there",
    input_norm=None,
    output_norm="post_attention_layernorm",
    q_norm="q_norm",
    k_norm="k_norm",
    rope_layer_type="sliding_attention",
    rope_layer_type_needs="sliding_window",
    tested={
        "exaone4": {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "exaone4-pattern": {"sliding_window": 12, "sliding_window_pattern": 2},
        "exaone4-no-window": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
        "exaone4-no-rope": {"sliding_window": 12, "layer_types": ["full_attention"] * 3},
    },
)
