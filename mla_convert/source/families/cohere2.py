"""Cohere 2: Command R7B and Command A."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="cohere2",
    checkpoints="Command R7B, Command A",
    traits="RoPE on adjacent dims, only in sliding-window layers; parallel residual",
    interleaved=True,
    freq_stride=2,
    rope_layer_type="sliding_attention",
    tested={
        "cohere2": {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    },
)
