"""Phi-3, Phi-3.5 and Phi-4."""

from mla_convert.source.families.base import Family

FAMILY = Family(
    model_type="phi3",
    checkpoints="Phi-3 and Phi-3.5 mini and medium, Phi-4, Phi-4-mini",
    traits="one projection for query, key and value; longrope; partial rotary in Phi-4-mini",
    partial_rotary=True,
    fused="qkv_proj",
    tested={
        "phi3": {"sliding_window": 12},
        "phi4-mini": {
            "hidden_size": 96,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
                "original_max_position_embeddings": 64,
            },
        },
    },
)
