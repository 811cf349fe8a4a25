"""Cohere North Micro, its language model."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="cohere_compass_text",
    checkpoints="North Micro Vision, the language model",
    traits="sliding windows; some types of layers without RoPE; parallel residual",
    tested={
        "cohere_compass_text": {
            "logit_scale": 0.25,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
                "full_attention": None,
            },
        },
    },
)
